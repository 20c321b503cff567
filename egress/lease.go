package egress

import (
	"fmt"
	"strconv"
)

// FormatLease returns the id of a lease as etcdctl prints it, hexadecimal.
func FormatLease(id int64) string { return fmt.Sprintf("%016x", uint64(id)) }

// ParseLease parses what FormatLease returns. 0 is no lease.
func ParseLease(s string) (int64, error) {
	id, err := strconv.ParseUint(s, 16, 63)
	if err != nil || id == 0 {
		return 0, fmt.Errorf("parsing lease id %q: want a hexadecimal number, as etcdctl prints it", s)
	}
	return int64(id), nil
}
