package vlan

import (
	"testing"

	"golang.org/x/sys/unix"
)

// An entry of a neighbour table is ours only with an address and our protocol, whatever the bytes are.
func FuzzProxyEntry(f *testing.F) {
	head := []byte{unix.AF_INET6, 0, 0, 0, 7, 0, 0, 0, 0, 0, flagNodeProxy, 0}
	ip := append([]byte{20, 0, unix.NDA_DST, 0, 0xfd, 0x10}, make([]byte, 14)...)
	for _, b := range [][]byte{
		nil, head[:11], head, append(head[:12:12], ip...), append(append(head[:12:12], ip...), 5, 0, ndaProtocol, 0, 196, 0, 0, 0),
		append(head[:12:12], 3, 0, 1, 0), append(head[:12:12], 8, 0, unix.NDA_DST, 0, 10, 0, 0, 1),
	} {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if index, ip, ours, err := proxyEntry(b); ours && err == nil && (!ip.IsValid() || len(b) <= sizeofNdMsg) {
			t.Errorf("%x is ours: %v on link %d", b, ip, index)
		}
	})
}
