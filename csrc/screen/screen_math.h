// Tanimoto's similarity as numbers that can be compared without rounding, once, for the CPU and the device.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace fastnuggets::screen {

// Two rows with `common` bits in common and `sum` bits in the one and in the other together.
struct Overlap {
  std::int32_t common, sum;
  FN_HD std::int32_t united() const { return sum - common; }
};

// Two empty rows have nothing in common, as in RDKit.
FN_HD double similarity(Overlap o) { return o.united() == 0 ? 0.0 : double(o.common) / double(o.united()); }

// floor(2^30 common / united): different fractions with denominators below 2^15 are more than 2^-30 apart, so their
// parts are in their order, and equal only if they are.
constexpr int kPartBits = 30;
FN_HD std::uint64_t part(Overlap o) {
  return o.united() == 0 ? 0 : (std::uint64_t(o.common) << kPartBits) / std::uint64_t(o.united());
}
// part(o) >= least, without a division; true for two empty rows.
FN_HD bool reaches(Overlap o, std::uint64_t least) {
  return (std::uint64_t(o.common) << kPartBits) >= least * std::uint64_t(o.united());
}
// No row of at least this similarity has a lower part.
FN_HD std::uint64_t least_part(double threshold) {
  const double scaled = threshold * double(1 << kPartBits);
  return scaled <= 1 ? 0 : std::uint64_t(scaled) - 1;
}

// A row of a database and its part in one number: the greater, the better. 0 is no row.
FN_HD std::uint64_t key(std::uint64_t part, std::int64_t row) { return part << 32 | std::uint64_t(0xFFFFFFFFll - row); }
FN_HD std::uint64_t part_of(std::uint64_t key) { return key >> 32; }
FN_HD std::int64_t row_of(std::uint64_t key) { return 0xFFFFFFFFll - std::int64_t(key & 0xFFFFFFFFull); }

}  // namespace fastnuggets::screen
