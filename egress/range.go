package egress

import (
	"cmp"
	"fmt"
	"math"
	"math/big"
	"net/netip"
)

// Range is one range of a pool's addresses, both ends included. Start and End are of one family, and Start is not after
// End.
type Range struct {
	Start netip.Addr `json:"start"`
	End   netip.Addr `json:"end"`
	// Written is how the pool's spec says it, for messages: a CIDR, or "start-end". Records in etcd are without it.
	Written string `json:"-"`
}

// ParseCIDR returns the range of the addresses of a CIDR that can be given out: without its first one, and for IPv4
// without its last one, as the guide has it. ok is false when none is left, as for an IPv4 /31 or /32 and an IPv6 /128.
func ParseCIDR(s string) (r Range, ok bool, err error) {
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return Range{}, false, fmt.Errorf("cidr %q: want an address and a prefix length, like 10.10.1.0/28", s)
	}
	p = p.Masked()
	last := lastAddr(p)
	if p.Addr().Is4() {
		if p.Bits() >= 31 {
			return Range{}, false, nil
		}
		last = last.Prev()
	} else if p.Bits() == 128 {
		return Range{}, false, nil
	}
	return Range{p.Addr().Next(), last, s}, true, nil
}

// ParseRange returns the range from start to end, both included.
func ParseRange(start, end string) (Range, error) {
	a, err := netip.ParseAddr(start)
	if err != nil {
		return Range{}, fmt.Errorf("start %q: want an IPv4 or IPv6 address", start)
	}
	b, err := netip.ParseAddr(end)
	if err != nil {
		return Range{}, fmt.Errorf("end %q: want an IPv4 or IPv6 address", end)
	}
	a, b = a.Unmap().WithZone(""), b.Unmap().WithZone("")
	if a.Is4() != b.Is4() {
		return Range{}, fmt.Errorf("start %s and end %s: want addresses of one family", start, end)
	}
	if b.Less(a) {
		return Range{}, fmt.Errorf("start %s is after end %s: want them the other way round", start, end)
	}
	return Range{a, b, start + "-" + end}, nil
}

// Contains reports whether ip lies in the range. All bits of the address count.
func (r Range) Contains(ip netip.Addr) bool {
	return ip.Is4() == r.Start.Is4() && !ip.Less(r.Start) && !r.End.Less(ip)
}

// Size returns the number of addresses in the range; it stays at math.MaxInt64 when there are more.
func (r Range) Size() int64 {
	a, b := r.Start.As16(), r.End.As16()
	n := new(big.Int).Sub(new(big.Int).SetBytes(b[:]), new(big.Int).SetBytes(a[:]))
	if n.Add(n, big.NewInt(1)); !n.IsInt64() {
		return math.MaxInt64
	}
	return n.Int64()
}

// Equal reports whether the ranges have the same addresses, however they are written.
func (r Range) Equal(o Range) bool { return r.Start == o.Start && r.End == o.End }

// String prints the range as it is written; "start-end" where that is not known.
func (r Range) String() string { return cmp.Or(r.Written, r.ends()) }

func (r Range) ends() string { return r.Start.String() + "-" + r.End.String() }

// Around prints the range for somebody who asks for ip: as it is written, and with its ends when that looks as if it
// had the address.
func (r Range) Around(ip netip.Addr) string {
	if p, err := netip.ParsePrefix(r.Written); err == nil && p.Contains(ip) && !r.Contains(ip) {
		return r.Written + " (" + r.ends() + ")"
	}
	return r.String()
}

// Contains reports whether ip is one of the pool's addresses. The gateway of the pool's subnet is none.
func (p Pool) Contains(ip netip.Addr) bool {
	if p.Subnet != nil && p.Subnet.Gateway == ip {
		return false
	}
	for _, r := range p.Ranges {
		if r.Contains(ip) {
			return true
		}
	}
	return false
}

// Total returns the number of addresses that the pool can give out; it stays at math.MaxInt64 when there are more.
func (p Pool) Total() int64 {
	var n int64
	for _, r := range p.Ranges {
		s := r.Size()
		if p.Subnet != nil && r.Contains(p.Subnet.Gateway) {
			s--
		}
		if n > math.MaxInt64-s {
			return math.MaxInt64
		}
		n += s
	}
	return n
}

// Free returns the lowest address that is not taken, ranges in order. It costs as many steps as addresses are taken,
// whatever the size of the pool. ok is false when the pool is exhausted.
func (p Pool) Free(taken func(netip.Addr) bool) (ip netip.Addr, ok bool) {
	for _, r := range p.Ranges {
		for ip := r.Start; ip.IsValid() && !r.End.Less(ip); ip = ip.Next() {
			if (p.Subnet == nil || p.Subnet.Gateway != ip) && !taken(ip) {
				return ip, true
			}
		}
	}
	return netip.Addr{}, false
}

func lastAddr(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}
