package routing

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/netns"
)

// marks does what package nft does about marks: toward a gateway they become an id, replies get the return mark, and none in the end.
const marks = `table inet test {
 chain pre { type filter hook prerouting priority -90; iifname "cni0" meta mark set 0x2002; iifname "out0" meta mark set 0x2000; iifname "egret.vx" meta mark set 0; }
 chain post { type filter hook postrouting priority 0; oifname "egret.vx" meta mark set 5; }
}`

// leave is what the gateway has more: what comes out of the overlay and is not for a pod leaves.
const leave = `table inet test { chain pre { iifname "egret.vx" meta mark set 0x3fff; }; }`

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
	reach(t, node, State{Overlay: Overlay{Local: a, MTU: mtu}, Peers: []Peer{{"b", b}}, NextHops: []NextHop{{egress.NodeMark(2), b}},
		Pods: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24"), netip.MustParsePrefix("fd44:1::2/128")}})
	netns.Switch(t, s.gateway)
	move(t, "host", s.outside)
	prepare(t, "peer", b)
	s.in(s.gateway, `ip link set out0 up
		ip addr add 203.0.113.1/24 dev out0
		ip addr add 2001:db8::1/64 dev out0 nodad`)
	reach(t, gateway, State{Overlay: Overlay{Local: b, MTU: mtu}, Peers: []Peer{{"a", a}}, Returns: map[netip.Addr]netip.Addr{
		netip.MustParseAddr("10.244.1.2"): a, netip.MustParseAddr("fd44:1::2"): a,
	}})
	s.in(s.pod, "ip link set pod name eth0\n"+podLines)
	s.in(s.outside, `ip link set host up
		ip addr add 203.0.113.10/24 dev host
		ip addr add 2001:db8::10/64 dev host nodad
		ip route add default via 203.0.113.1
		ip route add default via 2001:db8::1`)
	s.nft(s.node, marks)
	s.nft(s.gateway, marks+"\n"+leave)
	return s
}

// in runs lines of commands in a namespace of the site.
func (s site) in(ns int, lines string) {
	s.t.Helper()
	netns.Switch(s.t, ns)
	for line := range strings.Lines(lines) {
		netns.Run(s.t, strings.TrimSpace(line))
	}
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

// ping reports whether a packet of the pod with that many bytes of data, which nobody may cut up, comes back from outside.
func (s site) ping(ip string, size int) (string, bool) {
	netns.Switch(s.t, s.pod)
	out, err := exec.Command("ping", "-q", "-c", "2", "-W", "2", "-i", "0.1", "-M", "do", "-s", fmt.Sprint(size), ip).CombinedOutput()
	return string(out), err == nil
}

// TestPacketsGoThereAndBack pings an address outside from a pod, over the overlay to its gateway.
func TestPacketsGoThereAndBack(t *testing.T) {
	for _, under := range [][2]string{{"10.10.0.101", "10.10.0.102"}, {"fd10::101", "fd10::102"}} {
		t.Run("underlay "+under[0], func(t *testing.T) {
			s := newSite(t, under)
			mtu := 1450
			if netip.MustParseAddr(under[0]).Is6() {
				mtu = 1430
			}
			// As large as fits.
			for ip, size := range map[string]int{"203.0.113.10": mtu - 28, "2001:db8::10": mtu - 48} {
				if out, ok := s.ping(ip, size); !ok {
					t.Errorf("%s", out)
				}
			}
		})
	}
}

// What comes out of the overlay while somebody has flushed the nftables tables has no mark but an id, and would leave with any source.
func TestWhatComesOutOfTheOverlayWithoutTablesGoesNowhere(t *testing.T) {
	s := newSite(t, [2]string{"10.10.0.101", "10.10.0.102"})
	seen := func() (n string) {
		netns.Switch(t, s.outside)
		return strings.TrimSpace(netns.Run(t, "nft list counters table inet seen"))
	}
	s.in(s.outside, `nft add table inet seen
		nft add counter inet seen n
		nft add chain inet seen in { type filter hook prerouting priority 0 ; }
		nft add rule inet seen in meta l4proto { icmp , ipv6-icmp } ip saddr 10.244.1.2 counter name n
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

// As Calico with WireGuard and wg-quick set it: the kernel then looks for the source of a packet with the packet's mark.
func TestSourceChecksWithTheMarkDropNoEgressTraffic(t *testing.T) {
	s := newSite(t, [2]string{"10.10.0.101", "10.10.0.102"})
	for _, ns := range []int{s.node, s.gateway} {
		s.in(ns, "sysctl -qw net.ipv4.conf.all.src_valid_mark=1 net.ipv4.conf.all.rp_filter=1")
	}
	if out, ok := s.ping("203.0.113.10", 56); !ok {
		t.Errorf("%s", out)
	}
}

// With fwmark_reflect the kernel gives its own answers the mark of what it answers. They go to who asked, and not where that was going.
func TestAnswersOfTheNodeWithAReflectedMarkReachThePod(t *testing.T) {
	s := newSite(t, [2]string{"10.10.0.101", "10.10.0.102"})
	for _, ns := range []int{s.node, s.gateway} {
		s.in(ns, "sysctl -qw net.ipv4.fwmark_reflect=1 net.ipv6.fwmark_reflect=1")
	}
	for ip, size := range map[string]int{"203.0.113.10": 1450 - 28 + 1, "2001:db8::10": 1450 - 48 + 1} {
		// The first is answered by the node: it is too large for the overlay. The pod learns that from the answer, and says it of the second.
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
