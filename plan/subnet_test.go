package plan

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/routing"
	"github.com/egret-project/egret/vlan"
)

// links are those of a node with two uplinks.
var links = []Link{
	eth0,
	{Name: "eth1", MTU: 9000, MAC: [6]byte{2, 1, 1, 1, 1, 1}, Up: true, Prefixes: []netip.Prefix{netip.MustParsePrefix("10.20.0.101/24")}},
	{Name: "storage", MTU: 9000, Up: true, VLAN: 50, Parent: "eth0"},
	{Name: "egret.60", MTU: 1500, Up: true},
}

// inSubnet makes the pool of guide one of a subnet.
func inSubnet(owner string, s egress.Subnet) *egress.Snapshot {
	out := guide(owner)
	p := out.Pools["pool"]
	p.Subnet = &s
	out.Pools["pool"] = p
	return out
}

func TestBuildLeavesByTheSubnetOfThePool(t *testing.T) {
	type want struct {
		link    string
		parent  string // of a VLAN link
		vlan    int
		carried string // the link on which the tables answer
	}
	for _, tt := range []struct {
		name   string
		subnet egress.Subnet
		uplink string
		ip     string
		want   want
	}{
		{"of the nodes' own uplink", egress.Subnet{Gateway: ip("10.30.0.1"), PrefixLength: 24}, "", "10.30.0.7", want{link: "eth0", carried: "eth0"}},
		{"of the link whose subnet holds the IP", egress.Subnet{Gateway: ip("10.20.0.1"), PrefixLength: 24}, "", "10.20.0.7", want{link: "eth1", carried: "eth1"}},
		{"of the link that the operator says", egress.Subnet{Gateway: ip("10.30.0.1"), PrefixLength: 24}, "eth1", "10.30.0.7", want{link: "eth1", carried: "eth1"}},
		{"with a VLAN", egress.Subnet{Gateway: ip("10.20.0.1"), PrefixLength: 24, VLAN: 10}, "", "10.20.0.7", want{link: "egret.10", parent: "eth0", vlan: 10}},
		{"with a VLAN of the link that the operator says", egress.Subnet{Gateway: ip("10.20.0.1"), PrefixLength: 24, VLAN: 50}, "eth1", "10.20.0.7", want{link: "egret.50", parent: "eth1", vlan: 50}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := inSubnet("", tt.subnet)
			addr := ip(tt.ip)
			policy := s.Egresses["egress-0001"]
			policy.Addresses = []egress.Address{{IP: addr, ID: 1, Pool: "pool"}}
			s.Egresses["egress-0001"] = policy
			s.Owners[addr] = egress.Owner{IP: addr, Node: "node-1", Revision: 9}
			f := facts("node-1")
			f.Links, f.PoolUplink = links, tt.uplink
			d := Build(New(s), f, map[netip.Addr]Role{addr: Own})
			m := d.NFT.Hosted[1].Mark
			if len(d.Routing.Subnets) != 1 || m < egress.SubnetMark(0) || d.NFT.NextHops[1] != m {
				t.Fatalf("subnets %+v, mark %#x, next hop %#x, hosted %+v", d.Routing.Subnets, m, d.NFT.NextHops[1], d.NFT.Hosted[1])
			}
			wantSubnet := routing.Subnet{Mark: m, Link: tt.want.link, Prefix: tt.subnet.Prefix(), Gateway: tt.subnet.Gateway}
			if diff := cmp.Diff(wantSubnet, d.Routing.Subnets[0], compare); diff != "" {
				t.Errorf("subnet (-want +got):\n%s", diff)
			}
			if on := d.NFT.Hosted[1].Link; on != map[bool]string{true: tt.want.link}[tt.want.vlan > 0] {
				t.Errorf("what comes for the IP is let in by link %q of a VLAN", on)
			}
			if d.Announce[addr] != tt.want.link {
				t.Errorf("announced on %s, want %s", d.Announce[addr], tt.want.link)
			}
			v := d.VLAN.VLANs[tt.want.vlan]
			if onLink := len(v.Addresses) == 1 && v.Addresses[0] == netip.PrefixFrom(addr, tt.subnet.PrefixLength); v.Parent != tt.want.parent || onLink != (tt.want.vlan > 0) {
				t.Errorf("VLANs %+v, want %+v", d.VLAN.VLANs, tt.want)
			}
			if got := len(d.NFT.Carriers[tt.want.carried].IPs); got != map[bool]int{true: 1}[tt.want.carried != ""] {
				t.Errorf("carriers %+v, want the IP on %q alone", d.NFT.Carriers, tt.want.carried)
			}
		})
	}
}

func TestPoolsOfOneVLANShareItsLinkAndItsRoutes(t *testing.T) {
	s := inSubnet("node-1", egress.Subnet{Gateway: ip("10.10.0.1"), PrefixLength: 24, VLAN: 10})
	other := s.Pools["pool"]
	other.Name = "other"
	s.Pools["other"] = other
	second := ip("10.10.0.12")
	s.Egresses["second"] = egress.Policy{Name: "second", Addresses: []egress.Address{{IP: second, ID: 2, Pool: "other"}}}
	s.Owners[second] = egress.Owner{IP: second, Node: "node-1", Revision: 10}
	d := Build(New(s), facts("node-1"), map[netip.Addr]Role{egressIP: Own, second: Own})
	want := map[int]vlan.VLAN{10: {Parent: "eth0", MTU: 1500, MAC: egress.VLANMAC(ip("10.10.0.101"), 10).String(),
		Addresses: []netip.Prefix{netip.MustParsePrefix("10.10.0.12/24"), netip.MustParsePrefix("10.10.0.11/24")}}}
	if diff := cmp.Diff(want, d.VLAN.VLANs, compare); diff != "" || len(d.Routing.Subnets) != 1 {
		t.Errorf("VLANs (-want +got):\n%s\nsubnets %+v, want one", diff, d.Routing.Subnets)
	}
	// While somebody is asked for, that has the IP perhaps, there is the link, and nothing else.
	d = Build(New(s), facts("node-1"), map[netip.Addr]Role{egressIP: Ask})
	if v := d.VLAN.VLANs[10]; v.Parent != "eth0" || len(v.Addresses) > 0 || len(d.Permits) > 0 || len(d.NFT.Hosted) > 0 || len(d.Announce) > 0 {
		t.Errorf("asking: VLANs %+v, permits %+v, hosted %+v, announced %v", d.VLAN.VLANs, d.Permits, d.NFT.Hosted, d.Announce)
	}
	// Before and after a hand-over the link is there as well, and nothing answers.
	for _, role := range []Role{Relay, Arrive} {
		d = Build(New(s), facts("node-1"), map[netip.Addr]Role{egressIP: role})
		if v := d.VLAN.VLANs[10]; v.Parent != "eth0" || len(v.Addresses) > 0 || len(d.Routing.Subnets) != 1 || d.NFT.Hosted[1].Link != "egret.10" || len(d.Announce) > 0 {
			t.Errorf("role %d: hosted %+v, VLANs %+v, subnets %+v, announced %v", role, d.NFT.Hosted, d.VLAN.VLANs, d.Routing.Subnets, d.Announce)
		}
	}
}

func TestPoolsThatANodeCannotServeAreRefused(t *testing.T) {
	gateway := ip("10.10.0.1")
	for name, tt := range map[string]struct {
		subnet egress.Subnet
		change func(*Facts)
		want   string // begins with
	}{
		"fit":                         {egress.Subnet{Gateway: gateway, PrefixLength: 24, VLAN: 10}, func(*Facts) {}, ""},
		"a VLAN of another link":      {egress.Subnet{Gateway: gateway, PrefixLength: 24, VLAN: 50}, func(*Facts) {}, "link storage has VLAN 50 of eth0: remove it"},
		"a name of another program":   {egress.Subnet{Gateway: gateway, PrefixLength: 24, VLAN: 60}, func(*Facts) {}, "link egret.60 is another program's"},
		"a kernel without VLANs":      {egress.Subnet{Gateway: gateway, PrefixLength: 24, VLAN: 10}, func(f *Facts) { f.NoVLAN = true }, "the kernel has no VLAN links"},
		"which is well without one":   {egress.Subnet{Gateway: gateway, PrefixLength: 24}, func(f *Facts) { f.NoVLAN = true }, ""},
		"an uplink that is not there": {egress.Subnet{Gateway: gateway, PrefixLength: 24}, func(f *Facts) { f.PoolUplink = "eth7" }, "no link eth7, which --uplink names"},
	} {
		s := inSubnet("", tt.subnet)
		f := facts("node-1")
		f.Links = links
		tt.change(&f)
		got := Refused(s, f)["pool"]
		if !strings.HasPrefix(got, tt.want) || (got == "") != (tt.want == "") {
			t.Errorf("%s: refused %q, want %q", name, got, tt.want)
		}
		if claims := len(New(s).Claims(f)); (claims > 0) != (tt.want == "") {
			t.Errorf("%s: %d claims, refused %q", name, claims, got)
		}
		agent := s.Agents["node-1"]
		agent.Refused = Refused(s, f)
		s.Agents["node-1"] = agent
		if n := len(New(s).Candidates("pool")); n != map[bool]int{true: 3, false: 2}[tt.want == ""] {
			t.Errorf("%s: %d candidates", name, n)
		}
	}
}

func TestSubnetMarksStayWhenOtherSubnetsComeAndGo(t *testing.T) {
	s := &egress.Snapshot{Pools: map[string]egress.Pool{}}
	add := func(i int) egress.Subnet {
		subnet := egress.Subnet{Gateway: netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 1}), PrefixLength: 24}
		s.Pools[subnet.Gateway.String()] = egress.Pool{Subnet: &subnet}
		return subnet
	}
	first := add(0)
	was := subnetMarks(s)[first]
	for i := range 500 {
		add(i + 1)
	}
	marks := subnetMarks(s)
	seen := map[egress.Mark]bool{}
	for _, m := range marks {
		seen[m] = true
	}
	if len(marks) != 501 || len(seen) != 501 || marks[first] != was {
		t.Errorf("%d marks, %d of them distinct, for 501 subnets; the first has %#x, had %#x", len(marks), len(seen), marks[first], was)
	}
}
