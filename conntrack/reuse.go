package conntrack

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// ReusesPorts reports whether the kernel takes the port of a TCP connection that has ended, in TIME_WAIT or CLOSE,
// where NAT finds no free one (nf_nat_used_tuple_harder in net/netfilter/nf_nat_core.c, Linux 6.6). It does not say so
// in another way than by its version.
func ReusesPorts() bool {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return false // to take it for one that does would hide a want of ports
	}
	return reusesPorts(unix.ByteSliceToString(u.Release[:]))
}

func reusesPorts(release string) bool {
	var major, minor int
	n, _ := fmt.Sscanf(release, "%d.%d", &major, &minor) // what is no number is no such kernel
	return n == 2 && (major > 6 || major == 6 && minor >= 6)
}
