package lab

import (
	"testing"

	"golang.org/x/net/bpf"
)

func TestTheResetFilterLetsResetsThroughAndNothingElse(t *testing.T) {
	vm, err := bpf.NewVM(resetFilter)
	if err != nil {
		t.Fatal(err)
	}
	const reset, ack = 4, 16
	for _, test := range []struct {
		name    string
		network []byte // header
		flags   byte
		want    bool
	}{
		{"IPv4, RST", ipv4Header(6, 20), reset, true},
		{"IPv4 with options, RST and ACK", ipv4Header(6, 28), reset | ack, true},
		{"IPv4, ACK", ipv4Header(6, 20), ack, false},
		{"IPv4, UDP", ipv4Header(17, 20), reset, false},
		{"IPv6, RST", ipv6Header(6), reset, true},
		{"IPv6, ACK", ipv6Header(6), ack, false},
		{"IPv6, UDP", ipv6Header(17), reset, false},
		{"ARP", nil, reset, false},
	} {
		etherType := []byte{8, 6}
		switch {
		case len(test.network) == 40:
			etherType = []byte{0x86, 0xdd}
		case test.network != nil:
			etherType = []byte{8, 0}
		}
		segment := make([]byte, 20)
		segment[13] = test.flags
		n, err := vm.Run(append(append(append(make([]byte, 12), etherType...), test.network...), segment...))
		if err != nil || (n > 0) != test.want {
			t.Errorf("%s: %d bytes (%v) let through, want some: %t", test.name, n, err, test.want)
		}
	}
}

func ipv4Header(protocol byte, size int) []byte {
	b := make([]byte, size)
	b[0], b[9] = 0x40|byte(size/4), protocol
	return b
}

func ipv6Header(next byte) []byte {
	b := make([]byte, 40)
	b[0], b[6] = 0x60, next
	return b
}
