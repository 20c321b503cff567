package egress

import (
	"math"
	"net/netip"
	"net/url"
	"testing"
)

func TestParseCIDRLeavesOutNetworkAndBroadcast(t *testing.T) {
	tests := map[string]struct {
		first, last string
		size        int64
	}{
		"10.10.1.0/28":  {"10.10.1.1", "10.10.1.14", 14},
		"10.10.1.5/28":  {"10.10.1.1", "10.10.1.14", 14},
		"10.10.1.0/30":  {"10.10.1.1", "10.10.1.2", 2},
		"10.10.1.0/31":  {},
		"10.10.1.1/32":  {},
		"fd10::/126":    {"fd10::1", "fd10::3", 3},
		"fd10::/127":    {"fd10::1", "fd10::1", 1},
		"fd10::1/128":   {},
		"fd10::/64":     {"fd10::1", "fd10::ffff:ffff:ffff:ffff", math.MaxInt64},
		"10.0.0.0/8":    {"10.0.0.1", "10.255.255.254", 1<<24 - 2},
		"fd00::100/120": {"fd00::101", "fd00::1ff", 255},
	}
	for cidr, want := range tests {
		r, ok, err := ParseCIDR(cidr)
		if err != nil {
			t.Errorf("%s: %v", cidr, err)
			continue
		}
		if ok != (want.size > 0) {
			t.Errorf("%s: any addresses: %t", cidr, ok)
		}
		if ok && (r.Start.String() != want.first || r.End.String() != want.last || r.Size() != want.size) {
			t.Errorf("%s: got %s with %d addresses, want %s-%s with %d", cidr, r, r.Size(), want.first, want.last, want.size)
		}
	}
}

func TestParseRangeNamesWhatIsWrong(t *testing.T) {
	for _, bad := range [][2]string{{"", "10.0.0.1"}, {"10.0.0.1", "x"}, {"10.0.0.2", "10.0.0.1"}, {"10.0.0.1", "fd10::1"}} {
		if r, err := ParseRange(bad[0], bad[1]); err == nil {
			t.Errorf("%q to %q: got %s, want an error", bad[0], bad[1], r)
		}
	}
}

func TestFreeIsTheLowestAddressOfTheFirstRangeThatHasOne(t *testing.T) {
	a := netip.MustParseAddr
	p := Pool{
		Ranges: []Range{{Start: a("10.0.0.1"), End: a("10.0.0.3")}, {Start: a("10.0.0.250"), End: a("10.0.0.251")}},
		Subnet: &Subnet{Gateway: a("10.0.0.1"), PrefixLength: 24},
	}
	if p.Contains(a("10.0.0.1")) || p.Total() != 4 {
		t.Errorf("the gateway counts: total %d", p.Total())
	}
	taken := map[netip.Addr]bool{}
	for _, want := range []string{"10.0.0.2", "10.0.0.3", "10.0.0.250", "10.0.0.251"} {
		got, ok := p.Free(func(ip netip.Addr) bool { return taken[ip] })
		if !ok || got.String() != want {
			t.Fatalf("free: got %s, %t, want %s", got, ok, want)
		}
		taken[got] = true
	}
	if got, ok := p.Free(func(ip netip.Addr) bool { return taken[ip] }); ok {
		t.Errorf("exhausted pool gave %s", got)
	}
	top := Pool{Ranges: []Range{{Start: a("255.255.255.255"), End: a("255.255.255.255")}}}
	if got, ok := top.Free(func(netip.Addr) bool { return true }); ok {
		t.Errorf("the pool of the last address gave %s", got)
	}
}

func TestAPoolCostsWhatIsUsedOfItWhateverItsSize(t *testing.T) {
	for _, cidr := range []string{"10.0.0.0/8", "10.0.0.0/16", "fd00::/8"} {
		r, _, err := ParseCIDR(cidr)
		if err != nil {
			t.Fatal(err)
		}
		p := Pool{Ranges: []Range{r}}
		asked := 0
		if n := testing.AllocsPerRun(1, func() {
			asked = 0
			p.Free(func(netip.Addr) bool { asked++; return asked <= 3 })
		}); n != 0 || asked != 4 {
			t.Errorf("%s with 3 taken: %v allocations, asked about %d addresses, want 0 and 4", cidr, n, asked)
		}
		if n := testing.AllocsPerRun(1, func() { p.Contains(r.End); p.Total() }); n > 10 {
			t.Errorf("%s: %v allocations to look at it", cidr, n)
		}
	}
}

func TestSelectorMatchesAsKubernetesDefinesIt(t *testing.T) {
	labels := map[string]string{"role": "gateway", "zone": "a"}
	tests := map[string]struct {
		s    Selector
		want bool
	}{
		"empty":                     {Selector{}, true},
		"label":                     {Selector{MatchLabels: map[string]string{"role": "gateway"}}, true},
		"label with another value":  {Selector{MatchLabels: map[string]string{"role": "worker"}}, false},
		"empty value of no label":   {Selector{MatchLabels: map[string]string{"none": ""}}, false},
		"in":                        {Selector{MatchExpressions: []Requirement{{"zone", "In", []string{"a", "b"}}}}, true},
		"not in, key absent":        {Selector{MatchExpressions: []Requirement{{"none", "NotIn", []string{"a"}}}}, true},
		"not in":                    {Selector{MatchExpressions: []Requirement{{"zone", "NotIn", []string{"a"}}}}, false},
		"exists":                    {Selector{MatchExpressions: []Requirement{{"zone", "Exists", nil}}}, true},
		"does not exist":            {Selector{MatchExpressions: []Requirement{{"zone", "DoesNotExist", nil}}}, false},
		"unknown operator":          {Selector{MatchExpressions: []Requirement{{"zone", "Near", nil}}}, false},
		"one of two does not match": {Selector{map[string]string{"role": "gateway"}, []Requirement{{"zone", "In", []string{"b"}}}}, false},
	}
	for name, tt := range tests {
		if got := tt.s.Matches(labels); got != tt.want {
			t.Errorf("%s: %t, want %t", name, got, tt.want)
		}
	}
}

func TestMarksNeverMeetThoseOfOthers(t *testing.T) {
	if MaxID.ConnMark()&ConnTagMask != ConnTag || ID(MaxID.ConnMark()&^ConnTagMask) != MaxID {
		t.Errorf("id %d overlaps the tag: connection mark %s", MaxID, MaxID.ConnMark())
	}
	if IDBit&(MarkMask|Mark(MaxID)) != 0 || RuleMask != MarkMask|IDBit {
		t.Errorf("bit %s is one of a routing mark or of an id, or packets are not routed by it: %s", IDBit, RuleMask)
	}
	tables := map[int]Mark{}
	for _, m := range []Mark{LocalMark, ToGatewayMark, ToNodeMark, SubnetMark(0), SubnetMark(SubnetMarks - 1)} {
		if m&^MarkMask != 0 || m&RoutingBit == 0 {
			t.Errorf("mark %s is outside of %s, or is no routing mark", m, MarkMask)
		}
		if other, taken := tables[m.Table()]; taken || m.Table() == AddressTable {
			t.Errorf("marks %s and %s have one table, %d", m, other, m.Table())
		}
		tables[m.Table()] = m
	}
	for m, subnet := range map[Mark]bool{
		RoutingBit: false, SubnetMark(0) - 1: false, SubnetMark(0): true, SubnetMark(SubnetMarks - 1): true, SubnetMark(SubnetMarks): false,
		ToNodeMark: false, ToGatewayMark: false, LocalMark: false,
	} {
		if m.IsSubnet() != subnet {
			t.Errorf("mark %s is of a subnet: %t", m, !subnet)
		}
	}
	if got := SubnetMark(3).Table(); got != 7000+0x1000+3 { // the same for ever: a former version's routes are in it
		t.Errorf("table of the fourth subnet: %d", got)
	}
	if PeerMark(MaxNodeIndex)&^PeerMask != 0 || PeerMark(MaxNodeIndex)>>16 != MaxNodeIndex {
		t.Errorf("node %d has no mark: %s", MaxNodeIndex, PeerMark(MaxNodeIndex))
	}
}

// What two nodes translate for one gateway has to differ there, or replies go to the wrong one; and what one node does
// for two egress IPs, as far as the address has bits for it.
func TestOverlaySourcesOfTwoNodesOrEgressIPsDiffer(t *testing.T) {
	type sender struct {
		index int
		id    ID
	}
	for like, ids := range map[string][]ID{
		"10.10.0.11": {1, 2, 127, 128, 254, 255}, "fd10::11": {1, 2, 255, 256, 257, 2047, 2048, 0x7fff, 0x8000, MaxID - 1, MaxID},
	} {
		seen, nodes := map[netip.Addr]sender{}, map[netip.Addr]int{}
		for _, index := range []int{1, 2, 254, 255, 256, 257, 4095, 4096, 0x7fff, 0x8000, 0xff00, MaxNodeIndex - 1, MaxNodeIndex} {
			for _, id := range ids {
				a, now := OverlaySource(index, id, netip.MustParseAddr(like)), sender{index, id}
				if was, taken := seen[a]; taken {
					t.Errorf("%+v and %+v have one address, %s", was, now, a)
				}
				seen[a] = now
			}
			for _, id := range []ID{5, 5 + 256, 5 + 2048, MaxID} {
				a := OverlaySource(index, id, netip.MustParseAddr(like))
				if was, taken := nodes[a]; taken && was != index {
					t.Errorf("nodes %d and %d have one address, %s", was, index, a)
				}
				nodes[a] = index
			}
		}
	}
}

func TestOverlaySourcesStayWithinTheirPrefix(t *testing.T) {
	for like, within := range map[string]netip.Prefix{"10.10.0.11": OverlaySources4, "fd10::11": OverlaySources6} {
		for _, index := range []int{1, MaxNodeIndex} {
			for _, id := range []ID{1, 255, 256, 2047, 2048, MaxID} {
				a := OverlaySource(index, id, netip.MustParseAddr(like))
				if !within.Contains(a) || a.IsUnspecified() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255}) {
					t.Errorf("node %d, id %d: %s is outside of %s, or no address of a host", index, id, a, within)
				}
				if of, ok := IndexOfSource(a); of != index || !ok {
					t.Errorf("%s is read as that of node %d, %t; want %d", a, of, ok, index)
				}
			}
		}
	}
	for like, want := range map[string]string{"10.10.0.11": "0.5.1.2", "fd10::11": "fd65:6772:6574::305:102"} {
		if got := OverlaySource(0x0102, 0x0305, netip.MustParseAddr(like)).String(); got != want {
			t.Errorf("got %s, and the nodes that are not up to date yet have %s", got, want)
		}
		if _, ok := IndexOfSource(netip.MustParseAddr(like)); ok {
			t.Errorf("%s counts as an address between nodes", like)
		}
	}
}

func TestAKernelQuestionIsReadAsItWasWritten(t *testing.T) {
	ip, pod, to := netip.MustParseAddr("fd10::11"), netip.MustParseAddr("fd44::5"), netip.MustParseAddr("2001:db8::9")
	for _, q := range []KernelQuestion{{IP: ip, ID: 1}, {IP: ip, ID: MaxID, Pod: pod, Peer: MaxNodeIndex, To: to}, {IP: ip, ID: 1, Peer: 1}, {IP: ip, ID: 1, To: to},
		{IP: ip, ID: 1, To: to, Protocol: 6, Port: 65535}, {IP: ip, ID: 1, Protocol: 255}, {IP: ip, ID: 1, To: to, Protocol: 58},
		{Pod: pod}, {Pod: pod, To: to, Protocol: 6, Port: 443}} {
		if got, err := ParseKernelQuestion(q.Query()); got != q || err != nil {
			t.Errorf("%+v was read as %+v: %v", q, got, err)
		}
	}
	for _, bad := range []string{"", "pod=", "to=2001:db8::9", "ip=fd10::11&pod=fd44::5", "id=1&pod=fd44::5", "ip=&id=1&pod=fd44::5", "pod=fd44::5&to=198.51.100.9", "pod=fe80::1"} {
		if v, err := url.ParseQuery(bad); err != nil {
			t.Fatal(err)
		} else if q, err := ParseKernelQuestion(v); err == nil {
			t.Errorf("%q was read as %+v", bad, q)
		}
	}
	if q, err := ParseLiveQuestion(LiveQuestion{KernelQuestion: KernelQuestion{Pod: pod, To: to, Protocol: 6, Port: 443}}.Query()); err == nil {
		t.Errorf("packets of a pod of no egress IP are followed: %+v", q)
	}
	four := netip.MustParseAddr("198.51.100.9")
	for name, want := range map[string][2]bool{"tcp": {true, true}, "udp": {true, true}, "sctp": {true, true}, "icmp": {true, true}, "gre": {}, "esp": {}, "ah": {}, "253": {}, "58": {false, true}, "1": {true, false}} {
		for i, to := range []netip.Addr{four, to} {
			if n, err := Protocol(name, to); err != nil || HasPorts(n, to) != want[i] {
				t.Errorf("%s toward %s: number %d, %v, ports %v", name, to, n, err, HasPorts(n, to))
			}
		}
	}
	for q, want := range map[KernelQuestion]bool{
		{To: four, Protocol: 6, Port: 443}: true, {To: four, Protocol: 6}: false, {To: four, Protocol: 1}: true, {To: four, Protocol: 58}: false,
		{To: four}: false, {Protocol: 6, Port: 443}: false, {To: four, Protocol: 47}: false,
	} {
		if q.ToOne() != want {
			t.Errorf("%+v is about one destination: %v", q, !want)
		}
	}
}
