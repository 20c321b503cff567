package routing

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/netns"
)

// marks does what package nft does about marks: toward a gateway and a node they become an id, the worst there is,
// which is ToGatewayMark and more; and what comes out of the overlay on the pod's node has none.
const marks = `table inet test {
 chain pre { type filter hook prerouting priority -90;
  iifname "cni0" meta mark set 0x3ffe; iifname "out0" meta mark set 0x3ffd; iifname "egret.vx" meta mark set 0; }
 chain post { type filter hook postrouting priority 0; oifname "egret.vx" meta mark set 0x8fffe; }
}`

// leave is what the gateway has more: what comes out of the overlay leaves.
const leave = `table inet test { chain pre { iifname "egret.vx" meta mark set 0x3fff; }; }`

// blockIP and blockIP6 are egress IPs of which the pod's node has a block.
const blockIP, blockIP6 = "10.10.0.50", "fd10::50"

// source and source6 are what the pod's node has as its source for all else.
var (
	source  = egress.OverlaySource(1, 5, netip.MustParseAddr(blockIP)).String()
	source6 = egress.OverlaySource(1, 5, netip.MustParseAddr(blockIP6)).String()
)

// translate is what package nft does about sources on the pod's node.
func translate(source, source6 string) string {
	return fmt.Sprintf(`table inet nat {}
delete table inet nat
table inet nat { chain post { type nat hook postrouting priority 100;
 oifname "egret.vx" snat ip to %s; oifname "egret.vx" snat ip6 to %s; }
}`, source, source6)
}

// site is a pod on its node, and a gateway with a host outside, each in a namespace of its own.
type site struct {
	t                           *testing.T
	pod, node, gateway, outside int
}

const podLines = `ip link set eth0 up
	ip addr add 10.244.1.2/24 dev eth0
	ip addr add fd44:1::2/64 dev eth0 nodad
	ip route add default via 10.244.1.1
	ip route add default via fd44:1::1`

// newSite makes a site with strict rp_filter everywhere but where we say otherwise.
func newSite(t *testing.T, under [2]string) site {
	t.Helper()
	a, b := netip.MustParseAddr(under[0]), netip.MustParseAddr(under[1])
	mtu := 1450
	if a.Is6() {
		mtu = 1430
	}
	s := site{t: t}
	node := open(t)
	s.node = netns.Current(t)
	netns.Run(t, "ip link add eth0 type veth peer name peer")
	netns.Run(t, "ip link add cni0 type veth peer name pod")
	gateway := open(t)
	s.gateway = netns.Current(t)
	netns.Run(t, "ip link add out0 type veth peer name host")
	netns.Enter(t)
	s.pod = netns.Current(t)
	netns.Enter(t)
	s.outside = netns.Current(t)

	netns.Switch(t, s.node)
	move(t, "peer", s.gateway)
	move(t, "pod", s.pod)
	prepare(t, "eth0", a)
	s.in(s.node, `ip link set cni0 up
		ip addr add 10.244.1.1/24 dev cni0
		ip addr add fd44:1::1/64 dev cni0 nodad`)
	reach(t, node, State{Overlay: Overlay{Local: a, MTU: mtu}, Peers: []Peer{{"b", b}},
		Pods: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24"), netip.MustParsePrefix("fd44:1::2/128")}})
	leadTo(t, b)
	netns.Switch(t, s.gateway)
	move(t, "host", s.outside)
	prepare(t, "peer", b)
	s.in(s.gateway, `ip link set out0 up
		ip addr add 203.0.113.1/24 dev out0
		ip addr add 2001:db8::1/64 dev out0 nodad`)
	reach(t, gateway, State{Overlay: Overlay{Local: b, MTU: mtu}, Peers: []Peer{{"a", a}},
		Forwarded: []netip.Addr{netip.MustParseAddr(blockIP), netip.MustParseAddr(blockIP6)}})
	leadTo(t, a)
	s.in(s.pod, "ip link set pod name eth0\n"+podLines)
	s.in(s.outside, `ip link set host up
		ip addr add 203.0.113.10/24 dev host
		ip addr add 2001:db8::10/64 dev host nodad
		ip route add default via 203.0.113.1
		ip route add default via 2001:db8::1`)
	s.nft(s.node, marks+"\n"+translate(source, source6))
	s.nft(s.gateway, marks+"\n"+leave)
	return s
}

// in runs lines of commands in a namespace of the site.
func (s site) in(ns int, lines string) {
	s.t.Helper()
	netns.Switch(s.t, ns)
	netns.RunAll(s.t, "", lines)
}

// nft runs a script of nft(8) there.
func (s site) nft(ns int, script string) {
	s.t.Helper()
	file := s.t.TempDir() + "/script.nft"
	if err := os.WriteFile(file, []byte(script), 0o600); err != nil {
		s.t.Fatal(err)
	}
	s.in(ns, "nft -f "+file)
}

// ping reports whether a packet of the pod with that many bytes of data, which nobody may cut up, comes back from
// outside.
func (s site) ping(ip string, size int) (string, bool) {
	netns.Switch(s.t, s.pod)
	out, err := exec.Command("ping", "-q", "-c", "2", "-W", "2", "-i", "0.1", "-M", "do", "-s", fmt.Sprint(size), ip).CombinedOutput()
	return string(out), err == nil
}

// leadTo gives what goes to some node the MAC address of that one, as package nft does with each frame by what the
// packet is.
func leadTo(t *testing.T, node netip.Addr) {
	t.Helper()
	for _, next := range []string{"192.0.0.2", "fe80::2"} {
		netns.Run(t, fmt.Sprintf("ip neigh replace %s lladdr %s dev egret.vx nud permanent", next, egress.OverlayMAC(node)))
	}
}

// TestPacketsGoThereAndBack pings an address outside from a pod, over the overlay to its gateway, and back to its node.
func TestPacketsGoThereAndBack(t *testing.T) {
	for _, under := range [][2]string{{"10.10.0.101", "10.10.0.102"}, {"fd10::101", "fd10::102"}} {
		t.Run("underlay "+under[0], func(t *testing.T) {
			s := newSite(t, under)
			mtu := 1450
			if netip.MustParseAddr(under[0]).Is6() {
				mtu = 1430
			}
			for what, sources := range map[string][2]string{"by a block": {blockIP, blockIP6}, "by none": {source, source6}} {
				s.nft(s.node, translate(sources[0], sources[1]))
				// As large as fits.
				for ip, size := range map[string]int{"203.0.113.10": mtu - 28, "2001:db8::10": mtu - 48} {
					if out, ok := s.ping(ip, size); !ok {
						t.Errorf("%s: %s", what, out)
					}
				}
			}
		})
	}
}

// No node is meant by a frame that package nft has given no other MAC address than the next hop's.
func TestWhatIsForNoNodeReachesNone(t *testing.T) {
	s := newSite(t, [2]string{"10.10.0.101", "10.10.0.102"})
	s.in(s.node, `ip neigh replace 192.0.0.2 lladdr 02:e9:00:00:00:00 dev egret.vx nud permanent
		ip neigh replace fe80::2 lladdr 02:e9:00:00:00:00 dev egret.vx nud permanent`)
	for _, ip := range []string{"203.0.113.10", "2001:db8::10"} {
		if out, ok := s.ping(ip, 56); ok {
			t.Errorf("%s", out)
		}
	}
}

// What comes out of the overlay while somebody has flushed the nftables tables has no mark but an id, and would leave
// with any source.
func TestWhatComesOutOfTheOverlayWithoutTablesGoesNowhere(t *testing.T) {
	s := newSite(t, [2]string{"10.10.0.101", "10.10.0.102"})
	seen := func() (n string) {
		netns.Switch(t, s.outside)
		return strings.TrimSpace(netns.Run(t, "nft list counters table inet seen"))
	}
	s.in(s.outside, `nft add table inet seen
		nft add counter inet seen n
		nft add chain inet seen in { type filter hook prerouting priority 0 ; }
		nft add rule inet seen in icmp type echo-request counter name n
		nft add rule inet seen in icmpv6 type echo-request counter name n`)
	for _, ip := range []string{"203.0.113.10", "2001:db8::10"} {
		if out, ok := s.ping(ip, 56); !ok {
			t.Fatalf("with tables: %s", out)
		}
	}
	netns.Switch(t, s.gateway)
	netns.Run(t, "nft flush ruleset")
	before := seen()
	for _, ip := range []string{"203.0.113.10", "2001:db8::10"} {
		if out, ok := s.ping(ip, 56); ok {
			t.Errorf("without the gateway's tables: %s", out)
		}
	}
	if after := seen(); after != before {
		t.Errorf("what left without the gateway's tables was seen outside: %s, before: %s", after, before)
	}
	netns.Switch(t, s.gateway)
	if out, err := exec.Command("ping", "-c1", "-W2", "203.0.113.10").CombinedOutput(); err != nil {
		t.Errorf("the gateway itself is cut off: %s", out)
	}
}

// badIDs are ids with the bits of routing marks, and others.
var badIDs = []egress.ID{
	1, 5, 0x1001, 0x1fff, 0x2000, 0x2001, 0x3000, 0x3001, 0x3002, 0x3ffc, 0x3ffd, 0x3ffe, 0x3fff, 0x4000, 0x6000, 0x7ffe,
	0x8000, 0xbffd, 0xfffe, egress.MaxID,
}

// newWays makes a node of the namespace, with an uplink, subnets and what goes to other nodes, and returns what the
// kernel says of a packet's way, in the words of `ip route get`: "" if it has none. Some hundred questions are asked,
// of the kernel itself: an emulated machine takes a second to start ip.
func newWays(t *testing.T) (way func(mark egress.Mark, packet string) string) {
	t.Helper()
	r := open(t)
	prepare(t, "up0", netip.MustParseAddr("10.10.0.101"))
	netns.Run(t, "ip addr add 2001:db8::1/64 dev up0 nodad")
	want := parseState(t, sections(t, "testdata/subnets.txtar")["state"])
	want.Forwarded = []netip.Addr{netip.MustParseAddr(blockIP), netip.MustParseAddr(blockIP6)}
	reach(t, r, want)
	return func(mark egress.Mark, packet string) string {
		t.Helper()
		asked := netlink.RouteGetOptions{Mark: uint32(mark)}
		f := strings.Fields(packet)
		for i := 1; i+1 < len(f); i += 2 {
			switch f[i] {
			case "from":
				asked.SrcAddr = net.ParseIP(f[i+1])
			case "iif":
				asked.Iif = f[i+1]
			default:
				t.Fatalf("%s: what is %q?", packet, f[i])
			}
		}
		got, err := netlink.RouteGetWithOptions(net.ParseIP(f[0]), &asked)
		switch { // a blackhole is the error EINVAL for IPv4, and a route for IPv6
		case errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.EACCES), errors.Is(err, unix.EINVAL),
			err == nil && got[0].Type == unix.RTN_BLACKHOLE:
			return ""
		case err != nil:
			t.Fatalf("the way of a packet with mark %s to %s: %v", mark, packet, err)
		}
		link, err := net.InterfaceByIndex(got[0].LinkIndex)
		if err != nil {
			t.Fatal(err)
		}
		table := ""
		if got[0].Table != unix.RT_TABLE_MAIN {
			table = fmt.Sprintf(" table %d", got[0].Table)
		}
		return "dev " + link.Name + table
	}
}

// An id has bits at the places of a routing mark's, and is none: not in the rules of gateways and nodes, nor in those
// of subnets.
func TestNoIDIsTakenForARoutingMarkWithoutTables(t *testing.T) {
	way := newWays(t)
	for _, packet := range []string{
		"203.0.113.10 from " + source, source + " from 203.0.113.10", blockIP + " from 203.0.113.10",
		"2001:db8:1::10 from " + source6, source6 + " from 2001:db8:1::10", blockIP6 + " from 2001:db8:1::10",
	} {
		for _, id := range badIDs {
			if got := way(egress.IDBit|egress.Mark(id), packet+" iif egret.vx"); got != "" {
				t.Errorf("id %#x, to %s: %s", uint16(id), packet, got)
			}
		}
		if got := way(egress.LocalMark, packet+" iif egret.vx"); got == "" {
			t.Errorf("with the mark of the tables, to %s: no way either", packet)
		}
	}
}

// What the overlay link sends has the mark of what is in it as the kernel looks for its way.
func TestTheOverlaysOwnPacketsGoToTheNodeWhateverTheID(t *testing.T) {
	way := newWays(t)
	for _, node := range []string{"10.10.0.102", "2001:db8::102"} {
		for _, id := range badIDs {
			if got := way(egress.IDBit|egress.Mark(id), node); !strings.Contains(got, "dev up0") || strings.Contains(got, " table ") {
				t.Errorf("id %#x, to %s: %q", uint16(id), node, got)
			}
		}
	}
	for mark, want := range map[egress.Mark]string{egress.ToGatewayMark: "dev egret.vx", egress.SubnetMark(1): "dev up0 table 11097"} {
		if got := way(mark, "203.0.113.10 from "+source+" iif egret.vx"); !strings.Contains(got, want) {
			t.Errorf("a routing mark, %s: %q, want %s", mark, got, want)
		}
	}
}

// As Calico with WireGuard and wg-quick set it: the kernel then looks for the source of a packet with the packet's
// mark.
func TestSourceChecksWithTheMarkDropNoEgressTraffic(t *testing.T) {
	s := newSite(t, [2]string{"10.10.0.101", "10.10.0.102"})
	for _, ns := range []int{s.node, s.gateway} {
		s.in(ns, "sysctl -qw net.ipv4.conf.all.src_valid_mark=1 net.ipv4.conf.all.rp_filter=1")
	}
	if out, ok := s.ping("203.0.113.10", 56); !ok {
		t.Errorf("%s", out)
	}
}

// So it is where the pod's own node is the gateway, by the subnet of a pool: the packet has the subnet's mark from the
// pod's link on.
func TestSourceChecksWithTheMarkOfASubnetDropNoEgressTraffic(t *testing.T) {
	node := open(t)
	s := site{t: t, node: netns.Current(t)}
	netns.Run(t, "ip link add eth0 type veth peer name host")
	netns.Run(t, "ip link add cni0 type veth peer name pod")
	netns.Enter(t)
	s.pod = netns.Current(t)
	netns.Enter(t)
	s.outside = netns.Current(t)
	netns.Switch(t, s.node)
	move(t, "host", s.outside)
	move(t, "pod", s.pod)
	here, gateway := netip.MustParseAddr("10.10.0.101"), netip.MustParseAddr("10.10.0.200")
	prepare(t, "eth0", here)
	s.in(s.node, "ip link set cni0 up\nip addr add 10.244.1.1/24 dev cni0\nsysctl -qw net.ipv4.conf.all.src_valid_mark=1")
	s.in(s.pod, "ip link set pod name eth0\nip link set eth0 up\nip addr add 10.244.1.2/24 dev eth0\nip route add default via 10.244.1.1")
	s.in(s.outside, "ip link set host up\nip addr add 10.10.0.200/24 dev host\nip addr add 203.0.113.10/32 dev lo")
	s.nft(s.node, fmt.Sprintf(`table inet test {
		chain pre { type filter hook prerouting priority -90; iifname "cni0" meta mark set %s; }
		chain post { type nat hook postrouting priority 0; oifname "eth0" masquerade; }
	}`, egress.SubnetMark(1)))
	netns.Switch(t, s.node)
	reach(t, node, State{
		Overlay: Overlay{Local: here, MTU: 1450}, Pods: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")},
		Subnets: []Subnet{{Mark: egress.SubnetMark(1), Link: "eth0", Prefix: netip.PrefixFrom(gateway, 24).Masked(), Gateway: gateway}},
	})
	if out, ok := s.ping("203.0.113.10", 56); !ok {
		t.Errorf("%s", out)
	}
}

// With fwmark_reflect the kernel gives its own answers the mark of what it answers. They go to who asked, and not where
// that was going.
func TestAnswersOfTheNodeWithAReflectedMarkReachThePod(t *testing.T) {
	s := newSite(t, [2]string{"10.10.0.101", "10.10.0.102"})
	for _, ns := range []int{s.node, s.gateway} {
		s.in(ns, "sysctl -qw net.ipv4.fwmark_reflect=1 net.ipv6.fwmark_reflect=1")
	}
	for ip, size := range map[string]int{"203.0.113.10": 1450 - 28 + 1, "2001:db8::10": 1450 - 48 + 1} {
		// The first is answered by the node: it is too large for the overlay. The pod learns that from the answer, and
		// says it of the second.
		netns.Switch(t, s.pod)
		out, _ := exec.Command("ping", "-c", "2", "-W", "2", "-i", "0.2", "-M", "do", "-s", fmt.Sprint(size), ip).CombinedOutput()
		if !strings.Contains(string(out), "mtu=1450") && !strings.Contains(string(out), "mtu = 1450") && !strings.Contains(string(out), "mtu: 1450") {
			t.Errorf("the pod does not hear that its packet is too large:\n%s", out)
		}
	}
}

func move(t *testing.T, link string, ns int) {
	t.Helper()
	l, err := netlink.LinkByName(link)
	if err == nil {
		err = netlink.LinkSetNsFd(l, ns)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// prepare makes a node of the namespace: an uplink with a default route.
func prepare(t *testing.T, uplink string, ip netip.Addr) {
	t.Helper()
	netns.Run(t, "sysctl -qw net.ipv4.conf.all.rp_filter=1 net.ipv4.conf.default.rp_filter=1 net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1")
	netns.Run(t, "ip link set "+uplink+" up")
	bits := 24
	if ip.Is6() {
		bits = 64
	}
	for _, f := range families {
		netns.Run(t, "ip "+f.option+" route add default dev "+uplink)
	}
	netns.Run(t, fmt.Sprintf("ip addr add %s/%d dev %s nodad", ip, bits, uplink))
}
