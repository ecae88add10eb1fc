"""The commands of ``fastnuggets``, one file a group; ``fastnuggets.cli`` puts them together."""
