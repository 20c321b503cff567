package routing

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/egret-project/egret/internal/netns"
)

// TestWhatIsDamagedComesBack damages the kernel by hand, in every way that Diff has to see, and repairs it.
func TestWhatIsDamagedComesBack(t *testing.T) {
	for name, lines := range map[string]string{
		"guard deleted":             "ip rule del pref 1002",
		"IPv6 guard deleted":        "ip -6 rule del pref 1002",
		"the last rule deleted":     "ip rule del pref 1999",
		"gateways' rule deleted":    "ip rule del pref 1200",
		"rule with a selector":      "ip rule del pref 1999; ip rule add pref 1999 fwmark 0x3ffd/0x83fff iif lo lookup 15189 protocol 94",
		"rule to another table":     "ip rule del pref 1999; ip rule add pref 1999 fwmark 0x3ffd/0x83fff lookup 15190 protocol 94",
		"rule without a mask":       "ip rule add pref 1300 from 10.0.0.0/8 lookup 7000 protocol 94",
		"rule without the id's bit": "ip rule del pref 1999; ip rule add pref 1999 fwmark 0x3ffd/0x3fff lookup 15189 protocol 94",
		"closing rule deleted":      "ip rule del pref 1100; ip -6 rule del pref 1100",
		"rule too many":             "ip rule add pref 1200 fwmark 0x2009/0x3fff lookup 7009 protocol 94",
		"gateways' route deleted":   "ip route flush table 15190",
		"IPv6 route deleted":        "ip -6 route flush table 15190",
		"nodes' routes deleted":     "ip route flush table 15189",
		"route elsewhere":           "ip route replace default dev lo table 15190 protocol 94",
		"route to one node":         "ip route replace default via 10.10.0.102 dev egret.vx onlink table 15190 protocol 94",
		"IPv6 route with a second":  "ip -6 route append default via fe80::9 dev egret.vx table 15190 protocol 94",
		"route with a metric":       "ip route del default table 15190; ip route add default via 192.0.0.2 dev egret.vx onlink table 15190 protocol 94 metric 5",
		"route with an MTU":         "ip route replace default via 192.0.0.2 dev egret.vx onlink table 15190 protocol 94 mtu 1000",
		"route without its source":  "ip route replace 0.0.0.0/8 via 192.0.0.2 dev egret.vx onlink table 15189 protocol 94",
		"pods go to the gateway":    "ip route del throw 10.244.1.0/24 table 15190; ip route del throw 10.244.1.0/24 table 15189",
		"blackhole deleted":         "ip route flush table 15191; ip -6 route flush table 15191",
		"route too many":            "ip route add blackhole 192.0.2.0/24 table 7000 protocol 94; ip -6 route add unreachable 2001:db8::/32 table 7001 protocol 94",
		"neighbours deleted":        "ip neigh del 192.0.0.2 dev egret.vx; ip -6 neigh flush dev egret.vx nud permanent",
		"neighbour not permanent":   "ip neigh replace 192.0.0.2 lladdr 02:00:00:00:00:01 dev egret.vx nud reachable",
		"neighbour's MAC":           "ip neigh replace 192.0.0.2 lladdr 02:00:00:00:00:01 dev egret.vx nud permanent",
		"neighbour too many":        "ip neigh add 10.10.0.109 lladdr 02:00:00:00:00:01 dev egret.vx nud permanent",
		"FDB entry deleted":         "bridge fdb del 02:e9:ae:f4:27:9f dev egret.vx dst 10.10.0.103",
		"FDB entry elsewhere":       "bridge fdb replace 02:e9:ae:f4:27:9f dev egret.vx dst 10.10.0.109",
		"FDB entries too many":      "bridge fdb add 02:00:00:00:00:09 dev egret.vx dst 10.10.0.109; bridge fdb append 00:00:00:00:00:00 dev egret.vx dst 10.10.0.109",
		"FDB entry that ages":       "bridge fdb replace 02:e9:ae:f4:27:9f dev egret.vx dst 10.10.0.103 dynamic",
		"addresses deleted":         "ip addr flush dev egret.vx",
		"address too many":          "ip addr add 192.0.2.1/24 dev egret.vx",
		"link down":                 "ip link set egret.vx down",
		"link deleted":              "ip link del egret.vx",
		"link's MTU":                "ip link set egret.vx mtu 1400",
		"link's MAC":                "ip link set egret.vx address 02:00:00:00:00:01",
		"link in a bridge":          "ip link add bridge0 type bridge; ip link set egret.vx master bridge0",
		"link without ARP":          "ip link set egret.vx arp off",
		"link without IPv6":         "sysctl -qw net.ipv6.conf.egret/vx.disable_ipv6=1",
		"link that forwards not":    "sysctl -qw net.ipv4.ip_forward=1; sysctl -qw net.ipv4.conf.egret/vx.forwarding=0",
		"rp_filter":                 "sysctl -qw net.ipv4.conf.egret/vx.rp_filter=1",
		"accept_local":              "sysctl -qw net.ipv4.conf.egret/vx.accept_local=0",
		"addrgenmode":               "ip link set egret.vx addrgenmode eui64",
		"link of another VNI":       "ip link del egret.vx; ip link add egret.vx type vxlan id 8 dstport 8479 local 10.10.0.101 nolearning gbp",
		"link of another port":      "ip link del egret.vx; ip link add egret.vx type vxlan id 7 dstport 4789 local 10.10.0.101 nolearning gbp",
		"link without gbp":          "ip link del egret.vx; ip link add egret.vx type vxlan id 7 dstport 8479 local 10.10.0.101 nolearning",
		"link that learns":          "ip link del egret.vx; ip link add egret.vx type vxlan id 7 dstport 8479 local 10.10.0.101 gbp",
		"link of another kind":      "ip link del egret.vx; ip link add egret.vx type bridge; ip link set egret.vx up; ip addr add 10.10.0.101/32 dev egret.vx",
	} {
		t.Run(name, func(t *testing.T) {
			r := open(t)
			s := sections(t, "testdata/blocks.txtar")
			want := parseState(t, s["state"])
			reach(t, r, want)
			for line := range strings.SplitSeq(lines, "; ") {
				netns.Run(t, line)
			}
			c := reach(t, r, want)
			if c.Empty() {
				t.Error("not seen")
			}
			if diff := cmp.Diff(unordered(s["listing"]), unordered(listing(t))); diff != "" {
				t.Errorf("after\n%s(-want +got):\n%s", c, diff)
			}
		})
	}
}

// former is what a former version had where a node was the gateway of its own pods and of another node's.
const former = `
ip link add egret.vx mtu 1450 address 02:e9:69:67:60:1e type vxlan id 7 dstport 8479 local 10.10.0.101 nolearning gbp
ip link add egret.vo mtu 1450 address 02:e9:69:67:60:1e type veth peer name egret.vi mtu 1450 address 02:e9:69:67:60:1e
sysctl -qw net/ipv4/conf/egret.vx/rp_filter=2 net/ipv4/conf/egret.vx/accept_local=1 net/ipv4/conf/egret.vi/rp_filter=2
ip link set egret.vx addrgenmode none
ip link set egret.vx up
ip link set egret.vo arp off
ip link set egret.vo addrgenmode none
ip link set egret.vo up
ip link set egret.vi arp off
ip link set egret.vi addrgenmode none
ip link set egret.vi up
ip addr add 10.10.0.101/32 dev egret.vx scope link noprefixroute
ip addr add 192.0.0.8/32 dev egret.vi scope link noprefixroute
ip -6 addr add fe80::e9:69ff:fe67:601e/64 dev egret.vx nodad
ip neigh replace 10.10.0.102 lladdr 02:e9:60:c3:0b:d7 dev egret.vx nud permanent
ip neigh replace 192.0.0.2 lladdr 02:e9:00:00:00:00 dev egret.vx nud permanent
ip -6 neigh replace fe80::2 lladdr 02:e9:00:00:00:00 dev egret.vx nud permanent
ip -6 neigh replace fe80::e9:60ff:fec3:bd7 lladdr 02:e9:60:c3:0b:d7 dev egret.vx nud permanent
bridge fdb replace 02:e9:60:c3:0b:d7 dev egret.vx dst 10.10.0.102
ip route add 10.244.1.2/32 via 192.0.0.1 dev egret.vo onlink table 7000 protocol 94
ip route add 10.244.2.2/32 via 10.10.0.102 dev egret.vx onlink table 7000 protocol 94
ip route add blackhole default table 15191 protocol 94 metric 4294967295
ip route add default via 10.10.0.102 dev egret.vx onlink table 7002 protocol 94
ip route add default via 192.0.0.1 dev egret.vo onlink table 7009 protocol 94
ip route add default via 192.0.0.2 dev egret.vx onlink table 15190 protocol 94
ip -6 route add fd44:1::2/128 via fe80::1 dev egret.vo table 7000 protocol 94
ip -6 route add default via fe80::e9:60ff:fec3:bd7 dev egret.vx table 7002 protocol 94
ip rule add pref 1002 fwmark 0/0x3fff goto 1999 protocol 94
ip rule add pref 1100 iif egret.vi fwmark 0/0x2000 lookup 15191 protocol 94
ip rule add pref 1100 iif egret.vx fwmark 0/0x2000 lookup 15191 protocol 94
ip rule add pref 1101 fwmark 0/0x2000 goto 1999 protocol 94
ip rule add pref 1200 fwmark 0x2002/0x3fff lookup 7002 protocol 94
ip rule add pref 1200 fwmark 0x2009/0x3fff lookup 7009 protocol 94
ip rule add pref 1200 fwmark 0x3ffd/0x3fff lookup 15189 protocol 94
ip rule add pref 1200 fwmark 0x3ffe/0x3fff lookup 15190 protocol 94
ip rule add pref 1999 fwmark 0x2000/0x3fff lookup 7000 protocol 94
ip -6 rule add pref 1100 iif egret.vi fwmark 0/0x2000 lookup 15191 protocol 94
ip -6 rule add pref 1999 fwmark 0x2000/0x3fff lookup 7000 protocol 94
`

func TestWhatAFormerVersionLeftGoes(t *testing.T) {
	for name, change := range map[string]func(*State){
		"for what is wanted":                      func(*State) {},
		"the link alone, where a record is blind": func(s *State) { s.Keep = true },
		"with all else":                           func(s *State) { *s = State{} },
	} {
		t.Run(name, func(t *testing.T) {
			r := open(t)
			for line := range strings.Lines(strings.TrimSpace(former)) {
				netns.Run(t, strings.TrimSpace(line))
			}
			s := sections(t, "testdata/blocks.txtar")
			want := parseState(t, s["state"])
			change(&want)
			c := reach(t, r, want)
			if got := netns.Run(t, "ip link"); strings.Contains(got, "egret.vo") || strings.Contains(got, "egret.vi") {
				t.Errorf("the former link is there still:\n%s", got)
			}
			if before, _, _ := strings.Cut(c.String(), "ip link del egret.vo"); strings.Contains(before, "link add egret.vx") {
				t.Errorf("the overlay link is made anew, and what is on its way is lost:\n%s", c)
			}
			expected := s["listing"]
			switch {
			case want.Keep:
				return
			case !want.Overlay.Local.IsValid():
				expected = sections(t, "testdata/none.txtar")["listing"]
			}
			if diff := cmp.Diff(unordered(expected), unordered(listing(t))); diff != "" {
				t.Errorf("after\n%s(-want +got):\n%s", c, diff)
			}
		})
	}
}

// TestAChangedRouteIsNeverAway is about the half-way: what is sent has its old or its new next hop.
func TestAChangedRouteIsNeverAway(t *testing.T) {
	r := open(t)
	reach(t, r, parseState(t, sections(t, "testdata/subnets.txtar")["state"]))
	c := Diff(observe(t, r), parseState(t, sections(t, "testdata/subnet-gateway.txtar")["state"]))
	for _, part := range []Changes{c.Links(), c.Entries(), c.Locals()} {
		if err := r.Apply(part); err != nil {
			t.Fatal(err)
		}
	}
	got := netns.Run(t, "ip route show table 11097")
	if !strings.Contains(got, "default via 10.20.0.1 ") || !strings.Contains(got, "default via 10.20.0.2 ") {
		t.Errorf("the old route went before the new one came:\n%s", got)
	}
	if err := r.Apply(c.Removes()); err != nil {
		t.Fatal(err)
	}
	if got = netns.Run(t, "ip route show table 11097"); strings.Contains(got, "10.20.0.1 ") || !strings.Contains(got, "default via 10.20.0.2 ") {
		t.Errorf("the old route is there still, or the new one is not:\n%s", got)
	}
}

// Not even where it is the node that gets another address, which is in the route as the source of what it says of
// packets.
func TestARouteWithAnotherSourceIsNeverAway(t *testing.T) {
	r := open(t)
	netns.Run(t, "ip addr add 192.0.2.101/24 dev up0")
	netns.Run(t, "ip addr add 2001:db8::101/64 dev up0 nodad")
	without := parseState(t, sections(t, "testdata/source.txtar")["state"])
	with := without
	with.Sources = []netip.Addr{netip.MustParseAddr("192.0.2.101"), netip.MustParseAddr("2001:db8::101")}
	shown := func() string {
		return netns.Run(t, "ip route show table 15189") + netns.Run(t, "ip -6 route show table 15189")
	}
	reach(t, r, without)
	for _, step := range []struct {
		name string
		want State
	}{{"a source comes", with}, {"it goes", without}} {
		name, want := step.name, step.want
		c := Diff(observe(t, r), want)
		for _, part := range []Changes{c.Links(), c.Entries(), c.Locals(), c.Removes()} {
			if err := r.Apply(part); err != nil {
				t.Fatal(err)
			}
			if got := shown(); !strings.Contains(got, "0.0.0.0/8 via") || !strings.Contains(got, "fd65:6772:6574::/96 via") {
				t.Errorf("%s: a route is away after\n%s:\n%s", name, part, got)
			}
		}
		if left := Diff(observe(t, r), want); !left.Empty() {
			t.Errorf("%s: still to do:\n%s", name, left)
		}
	}
}

// foreign is what others may have in a namespace, as close to ours as it gets.
const foreign = `
ip link add uplink type veth peer name other
ip link set uplink addrgenmode none
ip link set other addrgenmode none
ip link set uplink up
ip link set other up
ip addr add 10.10.0.101/24 dev uplink
ip -6 addr add fd10::101/64 dev uplink nodad
ip link add egret type bridge
ip link add vx type vxlan id 7 dstport 4789 local 10.10.0.101 nolearning
ip rule add pref 1002 fwmark 0/0x83fff goto 1999
ip rule add pref 1999 fwmark 0x3ffd/0x83fff lookup 15189 protocol 95
ip rule add pref 1150 fwmark 0x3ffe/0x83fff lookup 15190 protocol static
ip rule add pref 2000 fwmark 0x3ffd/0x83fff lookup 15189 protocol 94
ip rule add pref 999 fwmark 0x3ffd/0x83fff lookup 15189 protocol 94
ip -6 rule add pref 1150 fwmark 0x3ffe/0x83fff lookup 15190 protocol static
ip route add 192.0.2.0/24 via 10.10.0.1 table 15189 protocol static
ip route add 0.0.0.0/8 via 10.10.0.1 table 15189 metric 7
ip route add default via 10.10.0.1 table 6999 protocol 94
ip route add default via 10.10.0.1 table 15192 protocol 94
ip route add default via 10.10.0.1 protocol 94
ip -6 route add default via fd10::1 table 15190 metric 7 protocol static
ip neigh add 192.0.0.2 lladdr 02:00:00:00:00:02 dev uplink nud permanent
bridge fdb append 02:e9:ae:f4:27:9f dev vx dst 10.10.0.103
sysctl -qw net.ipv4.conf.uplink.rp_filter=1
`

// everything is all that ip prints of a namespace but what is ours, and what the kernel counts.
func everything(t *testing.T) []string {
	t.Helper()
	var b strings.Builder
	for _, line := range []string{
		"ip -d -o link", "ip -d -o addr", "ip -d -4 rule", "ip -d -6 rule", "ip -d -4 route show table all", "ip -d -6 route show table all",
		"ip -d neigh show nud permanent", "bridge -d fdb", "sysctl net.ipv4.conf.uplink", "sysctl net.ipv4.conf.all",
		"sysctl net.ipv4.conf.default", "sysctl net.ipv6.conf.default.addr_gen_mode net.ipv6.conf.default.forwarding",
	} {
		for l := range strings.Lines(netns.Run(t, line)) {
			b.WriteString(line + ": " + l)
		}
	}
	return unordered(b.String())
}

// TestNothingOfOthersIsTouched is invariant 3 for links, rules, routes, neighbours and sysctls.
func TestNothingOfOthersIsTouched(t *testing.T) {
	r := open(t)
	for line := range strings.Lines(strings.TrimSpace(foreign)) {
		netns.Run(t, line)
	}
	before := everything(t)
	for _, name := range []string{"blocks", "source", "othernode", "subnets", "underlay6"} {
		reach(t, r, parseState(t, sections(t, "testdata/"+name+".txtar")["state"]))
		left := map[string]bool{}
		for _, l := range everything(t) {
			left[l] = true
		}
		for _, l := range before {
			if !left[l] {
				t.Errorf("%s took away or changed:\n%s", name, l)
			}
		}
	}
	if err := r.Delete(); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, everything(t)); diff != "" {
		t.Errorf("Delete left something, or took too much (-before +after):\n%s", diff)
	}
	if err := r.Delete(); err != nil {
		t.Errorf("nothing left to delete: %v", err)
	}
}

func TestRulesOfOthersApplyToPacketsThatAreNotOurs(t *testing.T) {
	r := open(t)
	netns.Run(t, "ip route add 192.0.2.0/24 dev lo table 500")
	netns.Run(t, "ip rule add pref 5000 from 10.10.0.101 lookup 500")
	s := sections(t, "testdata/blocks.txtar")
	reach(t, r, parseState(t, s["state"]))
	if got := netns.Run(t, "ip route get 192.0.2.1 from 10.10.0.101"); !strings.Contains(got, "table 500") {
		t.Errorf("a packet without mark: %s, want it to come to the rule behind ours", got)
	}
}

func TestARouteOfOthersInOurPlaceIsReportedAndKept(t *testing.T) {
	r := open(t)
	netns.Run(t, "ip route add default dev lo table 15190 protocol static")
	err := r.Apply(Diff(observe(t, r), parseState(t, sections(t, "testdata/source.txtar")["state"])))
	if !errors.Is(err, errForeignRoute) || strings.Count(err.Error(), "\n") > 0 || !strings.Contains(err.Error(), "table 15190") {
		t.Errorf("got %v, want one error that names table 15190", err)
	}
	if got := netns.Run(t, "ip route show table 15190"); !strings.HasPrefix(got, "default dev lo proto static") {
		t.Errorf("the route of others is gone:\n%s", got)
	}
	if got := netns.Run(t, "ip -6 route show table 15190"); !strings.Contains(got, "default via fe80::2 dev egret.vx") {
		t.Errorf("those behind it were held up:\n%s", got)
	}
}

func TestANamespaceWithoutIPv6IsServedAllTheSame(t *testing.T) {
	r := open(t)
	netns.Run(t, "sysctl -qw net.ipv6.conf.all.disable_ipv6=1")
	want := parseState(t, sections(t, "testdata/blocks.txtar")["state"])
	if c := reach(t, r, want); strings.Contains(c.String(), "ip -6") || strings.Contains(c.String(), "addrgenmode") {
		t.Errorf("IPv6 without IPv6:\n%s", c)
	}
	netns.Run(t, "sysctl -qw net.ipv6.conf.all.disable_ipv6=0")
	if c := reach(t, r, want); !strings.Contains(c.String(), "ip -6 route add fd10::50/128") {
		t.Errorf("IPv6 was turned on, and nothing came:\n%s", c)
	}
	netns.Run(t, "sysctl -qw net.ipv6.conf.all.disable_ipv6=1")
	reach(t, r, want)
	if got := netns.Run(t, "ip -6 rule"); strings.Contains(got, "94") {
		t.Errorf("IPv6 was turned off, and this is left:\n%s", got)
	}
}
