package inject

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/mdlayher/packet"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/internal/netns"
)

// world is a node, in the namespace of the test, with a pod and a host outside in namespaces of their own.
type world struct {
	pod, outside string // namespaces
}

// newWorld makes a node with a pod behind link pod0, and with bridged behind bridge cni0.
func newWorld(t *testing.T, bridged bool) world {
	netns.Enter(t)
	w := world{fmt.Sprintf("eginject-p%d", os.Getpid()), fmt.Sprintf("eginject-o%d", os.Getpid())}
	for _, name := range []string{w.pod, w.outside} {
		netns.Run(t, "ip netns add "+name)
		t.Cleanup(func() { netns.Run(t, "ip netns del "+name) })
	}
	toPod := []string{"ip link set pod0 up"}
	link := "pod0"
	if bridged {
		toPod = append([]string{"ip link add cni0 type bridge", "ip link set cni0 up", "ip link set pod0 master cni0"}, toPod...)
		link = "cni0"
	}
	lines := append([]string{"ip link add pod0 type veth peer name eth0 netns " + w.pod}, toPod...)
	lines = append(lines,
		"ip addr add 10.244.0.1/24 dev "+link, "ip -6 addr add fd44::1/64 dev "+link+" nodad",
		"ip link add out0 type veth peer name eth0 netns "+w.outside, "ip link set out0 up", "ip addr add 203.0.113.1/24 dev out0", "ip -6 addr add fd99::1/64 dev out0 nodad",
		// no other link passes for the pod's
		"sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv4.conf.all.rp_filter=1 net.ipv4.conf."+link+".rp_filter=1",
	)
	for _, at := range []struct{ name, ip4, ip6, via4, via6 string }{
		{w.pod, "10.244.0.5", "fd44::5", "10.244.0.1", "fd44::1"}, {w.outside, "203.0.113.9", "fd99::9", "203.0.113.1", "fd99::1"},
	} {
		in := "ip -n " + at.name
		lines = append(lines, in+" link set eth0 up", in+" addr add "+at.ip4+"/24 dev eth0", in+" -6 addr add "+at.ip6+"/64 dev eth0 nodad",
			in+" route add default via "+at.via4, in+" -6 route add default via "+at.via6)
	}
	for _, line := range lines {
		netns.Run(t, line)
	}
	return w
}

// sees returns a function that waits for a packet with a source in a namespace, and returns it without its link's header.
func (w world) sees(t *testing.T, namespace string, source netip.Addr) (wait func() []byte) {
	t.Helper()
	var c *packet.Conn
	if err := netns.Do(namespace, func() error {
		i, err := net.InterfaceByName("eth0")
		if err == nil {
			c, err = packet.Listen(i, packet.Datagram, unix.ETH_P_ALL, nil)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return func() []byte {
		t.Helper()
		b := make([]byte, 1500)
		c.SetReadDeadline(time.Now().Add(5 * time.Second))
		for {
			n, _, err := c.ReadFrom(b)
			if err != nil {
				return []byte(err.Error())
			}
			p := b[:n]
			if source.Is4() && len(p) >= 20 && p[0]>>4 == 4 && netip.AddrFrom4([4]byte(p[12:])) == source {
				return p
			}
			solicits := len(p) > 40 && p[6] == unix.IPPROTO_ICMPV6 && p[40] >= 133 && p[40] <= 136
			if source.Is6() && len(p) >= 40 && p[0]>>4 == 6 && netip.AddrFrom16([16]byte(p[8:])) == source && !solicits {
				return p
			}
		}
	}
}

var (
	pod4, pod6         = netip.MustParseAddr("10.244.0.5"), netip.MustParseAddr("fd44::5")
	outside4, outside6 = netip.MustParseAddr("203.0.113.9"), netip.MustParseAddr("fd99::9")
)

// filters returns how many filters a link has.
func filters(t *testing.T, name string) (n int) {
	t.Helper()
	link, err := netlink.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	for _, hook := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
		list, err := netlink.FilterList(link, hook)
		if err != nil {
			t.Fatal(err)
		}
		n += len(list)
	}
	return n
}

// Whatever is sent is seen outside with the pod's source, through a node whose rp_filter is strict, and is right: the
// host outside answers it, and the answer comes to the pod.
func TestWhatIsSentInAPodsNameLeavesAsThePodsOwn(t *testing.T) {
	for _, bridged := range []bool{false, true} {
		t.Run(fmt.Sprintf("bridged %t", bridged), func(t *testing.T) {
			w, link := newWorld(t, bridged), "pod0"
			if bridged {
				link = "cni0"
			}
			for _, tt := range []struct {
				p    Packet
				want string // protocol, and what begins behind the IP header
			}{
				{Packet{pod4, outside4, unix.IPPROTO_TCP, 40001, 443}, "6 9c4101bb"},
				{Packet{pod4, outside4, unix.IPPROTO_UDP, 40002, 53}, "17 9c420035"},
				{Packet{pod4, outside4, unix.IPPROTO_ICMP, 7, 0}, "1 0800"},
				{Packet{pod6, outside6, unix.IPPROTO_TCP, 40003, 443}, "6 9c4301bb"},
				{Packet{pod6, outside6, unix.IPPROTO_UDP, 40004, 53}, "17 9c440035"},
				{Packet{pod6, outside6, unix.IPPROTO_ICMPV6, 7, 0}, "58 8000"},
			} {
				sent, answered := w.sees(t, w.outside, tt.p.From), w.sees(t, w.pod, tt.p.To)
				if err := Send(t.Context(), tt.p); err != nil {
					t.Errorf("%v: %v", tt.p, err)
					continue
				}
				seen := sent()
				protocol, at := 9, 20
				if tt.p.From.Is6() {
					protocol, at = 6, 40
				}
				if len(seen) <= at || !strings.HasPrefix(fmt.Sprintf("%d %x", seen[protocol], seen[at:]), tt.want) {
					t.Errorf("%v: outside %x was seen, want %q", tt.p, seen, tt.want)
				}
				if a := answered(); len(a) <= at {
					t.Errorf("%v: no answer came to the pod: %s", tt.p, a)
				}
				if n := filters(t, link); n != 0 {
					t.Errorf("%v: %d filters are left at %s", tt.p, n, link)
				}
			}
		})
	}
}

// What another program has at the link stays, and what was left by a process that was killed goes.
func TestOthersFiltersStayAndWhatIsLeftGoes(t *testing.T) {
	w := newWorld(t, false)
	p := Packet{pod4, outside4, unix.IPPROTO_UDP, 40002, 53}
	pings := func(when string) {
		t.Helper()
		if out, err := exec.Command("ping", "-c1", "-W5", pod4.String()).CombinedOutput(); err != nil {
			t.Errorf("%s: the pod is not reached: %v\n%s", when, err, out)
		}
	}
	pings("before")
	link, err := netlink.LinkByName("pod0")
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // killed twice
		if err := turnAround(link, p); err != nil {
			t.Fatal(err)
		}
	}
	pings("beside what was left")
	sent := w.sees(t, w.outside, pod4)
	if err := Send(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	if seen := sent(); len(seen) <= 20 {
		t.Errorf("outside nothing was seen: %s", seen)
	}
	if n := filters(t, "pod0"); n != 0 {
		t.Errorf("%d filters are left", n)
	}
	// The kernel has one protocol at a priority.
	if err := turnAround(link, p); err != nil {
		t.Fatal(err)
	}
	sent = w.sees(t, w.outside, pod6)
	if err := Send(t.Context(), Packet{pod6, outside6, unix.IPPROTO_UDP, 40002, 53}); err != nil {
		t.Errorf("beside what was left of IPv4: %v", err)
	}
	if seen := sent(); len(seen) <= 40 {
		t.Errorf("outside nothing of IPv6 was seen: %s", seen)
	}
	if n := filters(t, "pod0"); n != 0 {
		t.Errorf("%d filters are left after IPv6", n)
	}
	other := Packet{From: pod4, To: pod4}.filter(link.Attrs().Index).(*netlink.U32)
	other.Priority, other.Parent = 1, netlink.HANDLE_MIN_INGRESS
	if err := netlink.FilterAdd(other); err != nil {
		t.Fatal(err)
	}
	with := filters(t, "pod0")
	if err := turnAround(link, p); err != nil {
		t.Fatal(err)
	}
	if err := Delete(); err != nil {
		t.Error(err)
	}
	if n := filters(t, "pod0"); n != with {
		t.Errorf("%d filters are there after Delete, want %d of another program", n, with)
	}
	if err := Send(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	if n := filters(t, "pod0"); n != with || n == 0 {
		t.Errorf("of another program's %d filters %d are left", with, n)
	}
}

func TestWhatCannotBeSentSaysWhy(t *testing.T) {
	newWorld(t, false)
	for _, line := range []string{"ip link add wg0 type veth peer name wg1", "ip link set wg0 up", "ip route add 10.244.9.0/24 via 203.0.113.9"} {
		netns.Run(t, line)
	}
	for _, tt := range []struct {
		p    Packet
		want string
	}{
		{Packet{From: netip.MustParseAddr("10.99.0.5"), To: outside4, Protocol: unix.IPPROTO_UDP, Port: 53}, "10.99.0.5"},
		{Packet{From: netip.MustParseAddr("10.244.9.5"), To: outside4, Protocol: unix.IPPROTO_UDP, Port: 53}, "not on this node"},
		{Packet{From: netip.MustParseAddr("10.244.0.1"), To: outside4, Protocol: unix.IPPROTO_UDP, Port: 53}, "10.244.0.1"},
		{Packet{From: netip.MustParseAddr("10.244.0.77"), To: outside4, Protocol: unix.IPPROTO_UDP, Port: 53}, "does not answer on link pod0"},
		{Packet{From: pod4, To: netip.MustParseAddr("10.244.0.9"), Protocol: unix.IPPROTO_UDP, Port: 53}, "10.244.0.9 is behind link pod0, as the pod is"},
		{Packet{From: pod4, To: pod4, Protocol: unix.IPPROTO_UDP, Port: 53}, "as the pod is"},
		{Packet{From: pod4, To: netip.MustParseAddr("203.0.113.1"), Protocol: unix.IPPROTO_UDP, Port: 53}, "203.0.113.1 is no host outside"},
		{Packet{From: pod4, To: netip.MustParseAddr("203.0.113.255"), Protocol: unix.IPPROTO_UDP, Port: 53}, "no host outside"},
		{Packet{From: pod6, To: netip.MustParseAddr("fd99::1"), Protocol: unix.IPPROTO_UDP, Port: 53}, "no host outside"},
		{Packet{From: pod4, To: outside4, Protocol: unix.IPPROTO_SCTP, Port: 53}, "protocol 132"},
	} {
		if err := Send(t.Context(), tt.p); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%v: %v, want an error that says %q", tt.p, err, tt.want)
		}
	}
	if n := filters(t, "pod0"); n != 0 {
		t.Errorf("%d filters are left", n)
	}
	// Where the kernel has a filter for the egress at the ingress, it would take what the pod itself sends.
	link, err := netlink.LinkByName("pod0")
	if err != nil {
		t.Fatal(err)
	}
	clsact := &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}}
	if err := netlink.QdiscDel(clsact); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) {
		t.Fatal(err)
	}
	ingress := &netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_INGRESS}}
	if err := netlink.QdiscAdd(ingress); err != nil {
		t.Fatal(err)
	}
	if err := Send(t.Context(), Packet{pod4, outside4, unix.IPPROTO_UDP, 40002, 53}); err == nil || !strings.Contains(err.Error(), "qdisc of another program") {
		t.Errorf("beside a qdisc ingress: %v", err)
	}
	if n := filters(t, "pod0"); n != 0 {
		t.Errorf("%d filters beside a qdisc ingress", n)
	}
}
