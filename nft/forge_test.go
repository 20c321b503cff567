package nft

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/mdlayher/packet"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/netns"
)

// inner is what somebody puts into a VXLAN packet.
type inner struct {
	node     netip.Addr // the overlay endpoint of the node that it is said to come from, or go to
	to       netip.Addr
	pod      netip.Addr // the source
	id       egress.ID
	plain    bool   // the id is not told to be one, which is in the bit A of the group policy (egress.IDBit)
	fragment bool   // it does not fit into one packet
	port     uint16 // the source port; 0: 7003
}

// vxlan returns a VXLAN packet with a group policy id (draft-smith-vxlan-group-policy), in it a datagram to port 7002
// of the server.
func (i inner) vxlan(server string) []byte {
	b := []byte{0x88, 0x08, 0, 0, 0, 0, egress.OverlayVNI, 0}
	if i.plain {
		b[1] = 0
	}
	binary.BigEndian.PutUint16(b[2:], uint16(i.id))
	b = append(append(b, egress.OverlayMAC(i.to)...), egress.OverlayMAC(i.node)...)
	payload := []byte("forged")
	if i.fragment {
		payload = append(payload, make([]byte, 1400)...)
	}
	port := cmp.Or(i.port, 7003)
	kind := []byte{8, 0}
	if i.pod.Is6() {
		kind = []byte{0x86, 0xdd}
	}
	return append(append(b, kind...), datagram(netip.AddrPortFrom(i.pod, port), netip.AddrPortFrom(netip.MustParseAddr(server), 7002), payload)...)
}

// datagram returns a UDP datagram with its IP header.
func datagram(from, to netip.AddrPort, payload []byte) []byte {
	udp := binary.BigEndian.AppendUint16(nil, from.Port())
	udp = binary.BigEndian.AppendUint16(udp, to.Port())
	udp = binary.BigEndian.AppendUint16(udp, uint16(8+len(payload)))
	udp = append(append(udp, 0, 0), payload...)
	src, dst := from.Addr().AsSlice(), to.Addr().AsSlice()
	sum := checksum(src, dst, []byte{0, 0, 0, unix.IPPROTO_UDP}, udp[4:6], []byte{0, 0}, udp)
	binary.BigEndian.PutUint16(udp[6:], sum)
	return packetOf(from.Addr(), to.Addr(), unix.IPPROTO_UDP, udp)
}

// packetOf returns an IP packet.
func packetOf(from, to netip.Addr, protocol byte, payload []byte) []byte {
	var ip []byte
	if from.Is4() {
		ip = []byte{0x45, 0, 0, 0, 0, 0, 0, 0, 64, protocol, 0, 0}
		binary.BigEndian.PutUint16(ip[2:], uint16(20+len(payload)))
		binary.BigEndian.PutUint16(ip[10:], checksum(ip, from.AsSlice(), to.AsSlice()))
	} else {
		ip = []byte{0x60, 0, 0, 0, 0, 0, protocol, 64}
		binary.BigEndian.PutUint16(ip[4:], uint16(len(payload)))
	}
	return append(append(append(ip, from.AsSlice()...), to.AsSlice()...), payload...)
}

// checksum is that of RFC 1071 over parts of even length, but the last.
func checksum(parts ...[]byte) uint16 {
	var sum uint32
	for _, p := range parts {
		for i := 0; i < len(p); i += 2 {
			w := uint32(p[i]) << 8
			if i+1 < len(p) {
				w |= uint32(p[i+1])
			}
			sum += w
		}
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// udp sends a datagram from a socket without any right, from an address or any.
func udp(from, to netip.Addr, port int, payload []byte) error {
	d := net.Dialer{Control: anySource}
	if from.IsValid() {
		d.LocalAddr = &net.UDPAddr{IP: from.AsSlice()}
	}
	c, err := d.Dial("udp", netip.AddrPortFrom(to, uint16(port)).String())
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.Write(payload)
	return err
}

// raw sends a datagram with a source of the sender's choice, as a pod with NET_RAW can.
func raw(from, to netip.Addr, port uint16, payload []byte) error {
	return sendRaw(datagram(netip.AddrPortFrom(from, 7003), netip.AddrPortFrom(to, port), payload), to)
}

// longer sends a datagram to the overlay's port as raw does, with an IP header that has options, or one more header
// behind it: for the destination, with nothing but padding (RFC 8200, section 4.6).
func longer(from, to netip.Addr, payload []byte) error {
	b := datagram(netip.AddrPortFrom(from, 7003), netip.AddrPortFrom(to, egress.OverlayPort), payload)
	if to.Is6() {
		return sendRaw(packetOf(from, to, unix.IPPROTO_DSTOPTS, slices.Concat([]byte{unix.IPPROTO_UDP, 0, 1, 4, 0, 0, 0, 0}, b[40:])), to)
	}
	head := append(b[:20:20], 1, 1, 1, 0) // no operation, and the end (RFC 791, section 3.1)
	head[0] = 0x46
	binary.BigEndian.PutUint16(head[2:], uint16(len(b)+4))
	head[10], head[11] = 0, 0
	binary.BigEndian.PutUint16(head[10:], checksum(head))
	return sendRaw(append(head, b[20:]...), to)
}

// sendRaw sends an IP packet as it is. A zone is the index of a link.
func sendRaw(b []byte, to netip.Addr) error {
	zone, _ := strconv.Atoi(to.Zone()) // 0: none
	family, addr := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{Addr: to.As16(), ZoneId: uint32(zone)})
	if to.Is4() {
		family, addr = unix.AF_INET, &unix.SockaddrInet4{Addr: to.As4()}
	}
	fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Sendto(fd, b, 0, addr)
}

// local runs f on the node itself.
func local(f func() error) error { return f() }

// in returns what runs a function in the namespace.
func (s space) in() func(func() error) error {
	return func(f func() error) error { return netns.Do(s.name, f) }
}

// attachPod makes a pod of a node in a namespace, on a link of its own.
func attachPod(t testing.TB, node space, name, number string) space {
	t.Helper()
	p := newSpace(t, name)
	node.run(`ip link add cni1 type veth peer name eth0 netns ` + p.name + `
		ip link set cni1 up
		ip addr add 10.244.` + number + `.1/24 brd + dev cni1
		ip addr add fd44:` + number + `::1/64 dev cni1 nodad`)
	p.run(`ip link set eth0 up
		ip addr add 10.244.` + number + `.2/24 brd + dev eth0
		ip addr add fd44:` + number + `::2/64 dev eth0 nodad
		ip route add default via 10.244.` + number + `.1
		ip -6 route add default via fd44:` + number + `::1`)
	return p
}

// A pod that no egress selects writes VXLAN packets of its own, in which it is one that an egress selects, and has them
// brought to the gateway in every way there is. None comes out of it with the egress IP.
func TestNobodyButANodeSendsByTheOverlay(t *testing.T) {
	for i, f := range bothSides {
		ends := [][2]string{{"10.11.0.101", "10.11.0.102"}, {"fd11::101", "fd11::102"}}[i]
		t.Run(f.pod, func(t *testing.T) {
			testOverlayAttacks(t, f, netip.MustParseAddr(ends[0]), netip.MustParseAddr(ends[1]))
		})
	}
}

func testOverlayAttacks(t *testing.T, f sides, here, there netip.Addr) {
	tables := open(t)
	ext, p := outside(t), pod(t)
	ext.serve(f.server)
	gw := remoteGateway(t, ext, here, there)
	own := attachPod(t, gw, "own", "2")
	far := gw.tables()
	nodes := fmt.Sprintf("mtu 1430\nself %s\nnode %s\n", here, there)
	reach(t, tables, parseState(t, nodes+f.atPod(5, there)))
	reach(t, far, parseState(t, fmt.Sprintf("mtu 1430\nself %s\nnode %s\n", there, here)+f.atGateway(5, here)))
	if err := far.Permit([]Permit{{IP: f.egressIP()}}, time.Hour); err != nil {
		t.Fatal(err)
	}
	if got := p.seen(f.server); got != f.egress {
		t.Fatalf("the pod that is selected leaves as %q, want %s; counters %v", got, f.egress, fmt.Sprint(far.Counters()))
	}
	reach(t, tables, parseState(t, nodes))

	// Services with an endpoint that is a node, in the way of kube-proxy.
	const port = int(egress.OverlayPort)
	service := []netip.Addr{netip.MustParseAddr("203.0.113.99"), netip.MustParseAddr("2001:db8::99")}[there.BitLen()/128]
	node1 := netip.MustParseAddr(f.node)
	protocol, family := "ipv4", "ip"
	if there.Is6() {
		protocol, family = "ipv6", "ip6"
	}
	dnat := fmt.Sprintf("meta nfproto %s udp dport 53 dnat %s to %s", protocol, family, netip.AddrPortFrom(there, uint16(port)))
	balance := `table inet lb { chain pre { type nat hook prerouting priority -100; ` + dnat + `; };
		chain out { type nat hook output priority -100; ` + dnat + `; };
		chain post { type nat hook postrouting priority 100; ct status dnat masquerade; }; }`
	nft(t, balance)
	gw.do(func() error { nft(t, balance); return nil })

	everybody := netip.MustParseAddr("10.244.2.255")
	if there.Is6() {
		everybody = netip.MustParseAddr("ff02::1%eth0")
	}
	lan := netip.MustParseAddr("10.12.0.102")
	if there.Is6() {
		lan = netip.MustParseAddr("fd12::102")
	}
	netns.Run(t, fmt.Sprintf("ip route add %s via %s", lan, there))
	any, here1 := netip.Addr{}, inner{node: here, to: there, pod: f.overlaySource(5), id: 5}
	long, own1 := here1, here1
	long.fragment = true
	own1.node = there // as by the gateway itself
	for _, a := range []struct {
		name string
		from func(func() error) error
		send func(b []byte) error
		inner
	}{
		{"a pod of another node", p.in(), func(b []byte) error { return udp(any, there, port, b) }, here1},
		{"a pod of another node, in fragments", p.in(), func(b []byte) error { return udp(any, there, port, b) }, long},
		{"a pod of another node, to another address of the gateway", p.in(), func(b []byte) error { return udp(any, lan, port, b) }, here1},
		{"a pod of another node, by a Service", p.in(), func(b []byte) error { return udp(any, service, 53, b) }, here1},
		{"a pod of another node, by a Service and in fragments", p.in(), func(b []byte) error { return udp(any, service, 53, b) }, long},
		{"a pod of another node with NET_RAW, as a node", p.in(), func(b []byte) error { return raw(here, there, uint16(port), b) }, here1},
		{"a host outside, by a NodePort of another node", ext.in(), func(b []byte) error { return udp(any, node1, 53, b) }, here1},
		{"a pod of the gateway", own.in(), func(b []byte) error { return udp(any, there, port, b) }, here1},
		{"a pod of the gateway, as by the gateway itself", own.in(), func(b []byte) error { return udp(any, there, port, b) }, own1},
		{"a pod of the gateway, by a Service", own.in(), func(b []byte) error { return udp(any, service, 53, b) }, here1},
		{"a pod of the gateway, to everybody", own.in(), func(b []byte) error { return broadcast(everybody, port, b) }, here1},
		{"a pod of the gateway with NET_RAW, as a node", own.in(), func(b []byte) error { return raw(here, there, uint16(port), b) }, here1},
		{"a pod of the gateway with NET_RAW, as the gateway", own.in(), func(b []byte) error { return raw(there, there, uint16(port), b) }, own1},
		{"a pod of another node with NET_RAW, as a node, behind more headers", p.in(), func(b []byte) error { return longer(here, there, b) }, here1},
		{"a pod of the gateway with NET_RAW, as a node, behind more headers", own.in(), func(b []byte) error { return longer(here, there, b) }, here1},
		{"a process of another node", local, func(b []byte) error { return udp(any, there, port, b) }, here1},
		{"a process of another node, by a Service", local, func(b []byte) error { return udp(any, service, 53, b) }, here1},
		{"a process of the gateway", gw.in(), func(b []byte) error { return udp(any, there, port, b) }, here1},
		{"a process of the gateway, to itself", gw.in(), func(b []byte) error { return udp(any, netip.MustParseAddr("::1"), port, b) }, here1},
		{"a process of the gateway, as a node", gw.in(), func(b []byte) error { return udp(here, there, port, b) }, here1},
		{"a process of the gateway, by a Service", gw.in(), func(b []byte) error { return udp(any, service, 53, b) }, here1},
	} {
		sneaks(t, a.name, ext, f, func() {
			// What is refused at once is as good.
			err := a.from(func() error { return a.send(a.vxlan(f.server)) })
			if err != nil && !slices.ContainsFunc(refusals, func(r error) bool { return errors.Is(err, r) }) {
				t.Errorf("%s: %v", a.name, err)
			}
		})
	}
}

// refusals are what the kernel says to a sender whose datagram it drops, or who takes an address that it may not.
var refusals = []error{unix.EPERM, unix.EADDRNOTAVAIL, unix.EINVAL, unix.ENETUNREACH}

// sneaks fails the test when the server sees a datagram while try tries, and a little longer.
func sneaks(t *testing.T, who string, ext space, f sides, try func()) {
	t.Helper()
	var c net.PacketConn
	ext.do(func() (err error) { c, err = net.ListenPacket("udp", net.JoinHostPort(f.server, "7002")); return err })
	defer c.Close()
	try()
	if err := c.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 2000)
	if n, from, err := c.ReadFrom(b); err == nil {
		t.Errorf("%s: the server sees %d bytes of %s", who, n, from)
	}
}

// broadcast sends a datagram to everybody on the link.
func broadcast(to netip.Addr, port int, payload []byte) error {
	c, err := net.ListenUDP("udp", nil)
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.WriteToUDPAddrPort(payload, netip.AddrPortFrom(to, uint16(port)))
	return err
}

// Whoever writes an egress IP as the source into his packets himself is not seen with it: on the node that holds it,
// and on others.
func TestNobodySendsInTheNameOfAnEgressIP(t *testing.T) {
	for _, f := range bothSides {
		t.Run(f.pod, func(t *testing.T) {
			tables := open(t)
			ext, p := outside(t), pod(t)
			ext.serve(f.server)
			ip, server := f.egressIP(), netip.MustParseAddr(f.server)
			netns.Run(t, "sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.cni0.rp_filter=0")
			reach(t, tables, parseState(t, "except "+f.pods+"\npooled "+f.egress))
			attempts := func(where string, byProcess bool) {
				t.Helper()
				try := func(who string, from func(func() error) error, send func() error) {
					t.Helper()
					counts(t, tables, CounterForged, func() {
						sneaks(t, who+where, ext, f, func() {
							if err := from(send); err != nil && !errors.Is(err, unix.EPERM) {
								t.Errorf("%s%s: %v", who, where, err)
							}
						})
					})
				}
				try("a pod with NET_RAW", p.in(), func() error { return raw(ip, server, 7002, []byte("forged")) })
				if byProcess {
					process := func() error { return udp(ip, server, 7002, []byte("forged")) }
					try("a process of the node", local, process)
					// as Calico does with its VXLAN
					nft(t, "table inet raw { chain out { type filter hook output priority -300; udp dport 7002 notrack; }; }")
					try("a process of the node, excepted from conntrack,", local, process)
					nft(t, "delete table inet raw")
				}
			}
			// a process cannot bind to an IPv4 address of others
			attempts(" of a node that does not hold the IP", ip.Is6())
			f.addEgressIP(t)
			reach(t, tables, parseState(t, "except "+f.pods+"\npooled "+f.egress+"\naddressguard "+f.egress))
			if err := tables.Permit([]Permit{{ip, true}}, time.Hour); err != nil {
				t.Fatal(err)
			}
			attempts(" of the node that holds it", true)
			if !ext.ok("ping -c1 -W0.5 " + f.egress) {
				t.Error("the egress IP answers no echo request")
			}

			// A static one is the node's own address.
			reach(t, tables, parseState(t, "except "+f.pods+"\nsource "+f.node))
			counts(t, tables, CounterForged, func() {
				sneaks(t, "a pod with NET_RAW, as its node", ext, f, func() {
					if err := p.in()(func() error { return raw(netip.MustParseAddr(f.node), server, 7002, []byte("forged")) }); err != nil {
						t.Error(err)
					}
				})
			})
			if got := p.seen(f.server); got != f.node {
				t.Errorf("the pod leaves as %q, want its node", got)
			}
			if err := udp(netip.MustParseAddr(f.node), server, 7000, []byte("?")); err != nil {
				t.Errorf("the node does not send with its own address: %v", err)
			}

			// Packets of an egress IP that come from outside are not forged: a pod may be reached from it.
			reach(t, tables, parseState(t, "except "+f.pods+"\npooled "+f.lan))
			p.serve(f.pod)
			ext.run("ip route add " + f.pods + " via " + f.node)
			if got := ext.seen(f.pod); got == "" {
				t.Error("a connection from an egress IP of another node does not reach a pod")
			}
		})
	}
}

// A host outside pings the egress IP, so there is a connection to it. A pod says something of that in the IP's name;
// and it sends there what is in no connection, to where no egress applies.
func TestNobodyAnswersInTheNameOfAnEgressIP(t *testing.T) {
	for _, f := range bothSides {
		t.Run(f.pod, func(t *testing.T) {
			tables := open(t)
			ext, p := outside(t), pod(t)
			ip, server, lan := f.egressIP(), netip.MustParseAddr(f.server), netip.MustParseAddr(f.lan)
			f.addEgressIP(t)
			netns.Run(t, "sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.cni0.rp_filter=0")
			reach(t, tables, parseState(t, f.base()+"pooled "+f.egress))
			if err := tables.Permit([]Permit{{ip, true}}, time.Hour); err != nil {
				t.Fatal(err)
			}
			hears := f.listenICMP(t, ext)
			question := f.echo(server, ip, 77, false, "question")
			ext.do(func() error { return sendRaw(question, ip) })
			if got := hears(ip, "question"); !got {
				t.Fatal("the egress IP answers no echo request")
			}
			for _, a := range []struct {
				name string
				to   netip.Addr
				b    []byte
			}{
				{"an echo reply", server, f.echo(ip, server, 77, true, "forged")},
				{"an error", server, unreachable(ip, server, append(question, "forged"...))},
				{"an echo reply that nobody asked for", server, f.echo(ip, server, 78, true, "forged")},
				{"an echo reply to where no egress applies", lan, f.echo(ip, lan, 78, true, "forged")},
			} {
				counts(t, tables, CounterForged, func() {
					p.do(func() error { return sendRaw(a.b, a.to) })
					if hears(ip, "forged") {
						t.Errorf("%s of a pod leaves with the egress IP", a.name)
					}
				})
			}
		})
	}
}

// echo returns an ICMP echo request, or a reply.
func (f sides) echo(from, to netip.Addr, id byte, reply bool, text string) []byte {
	kind := map[bool]byte{false: 8, true: 0}[reply]
	var head []byte // what else the checksum is of
	if from.Is6() {
		kind = map[bool]byte{false: 128, true: 129}[reply]
		head = slices.Concat(from.AsSlice(), to.AsSlice(), []byte{0, 0, 0, byte(8 + len(text)), 0, 0, 0, f.icmp()})
	}
	icmp := append([]byte{kind, 0, 0, 0, 0, id, 0, 1}, text...)
	binary.BigEndian.PutUint16(icmp[2:], checksum(head, icmp))
	return packetOf(from, to, f.icmp(), icmp)
}

// listenIP opens a socket for all packets that come to ext's link. The source is at an offset of a packet, followed by
// the destination; header is how long the IP header is, bytes.
func (f sides) listenIP(t *testing.T, ext space) (on *packet.Conn, source, header int) {
	t.Helper()
	kind, source, header := unix.ETH_P_IP, 12, 20
	if f.egressIP().Is6() {
		kind, source, header = unix.ETH_P_IPV6, 8, 40
	}
	ext.do(func() error {
		ifi, err := net.InterfaceByName("eth0")
		if err == nil {
			on, err = packet.Listen(ifi, packet.Datagram, kind, nil)
		}
		return err
	})
	t.Cleanup(func() { on.Close() })
	return on, source, header
}

// listenICMP returns what tells whether an ICMP packet of a source, with a text in it, comes to ext's link within a
// while.
func (f sides) listenICMP(t *testing.T, ext space) func(from netip.Addr, text string) bool {
	t.Helper()
	on, source, header := f.listenIP(t, ext)
	return func(from netip.Addr, text string) bool {
		t.Helper()
		if err := on.SetReadDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		for b := make([]byte, 2000); ; {
			n, _, err := on.ReadFrom(b)
			if err != nil {
				return false
			}
			if n > header && string(b[source:source+from.BitLen()/8]) == key(from) && bytes.Contains(b[:n], []byte(text)) {
				return true
			}
		}
	}
}

// A NodePort, or a hostPort, is one at every address of the node: by a DNAT that comes before the input hook.
func TestTheEgressIPOffersNoNodePort(t *testing.T) {
	for _, f := range bothSides {
		t.Run(f.egress, func(t *testing.T) {
			tables := open(t)
			ext, p := outside(t), pod(t)
			p.serve(f.pod)
			protocol, family := "ipv4", "ip"
			if f.egressIP().Is6() {
				protocol, family = "ipv6", "ip6"
			}
			dnat := fmt.Sprintf("meta nfproto %s udp dport 7000 fib daddr type local dnat %s to %s", protocol, family, f.pod)
			nft(t, `table inet lb { chain pre { type nat hook prerouting priority -100; `+dnat+`; };
				chain out { type nat hook output priority -100; `+dnat+`; };
				chain post { type nat hook postrouting priority 100; ct status dnat masquerade; }; }`)
			f.addEgressIP(t)
			reach(t, tables, parseState(t, f.base()))
			if err := tables.Permit([]Permit{{f.egressIP(), true}}, time.Hour); err != nil {
				t.Fatal(err)
			}
			for _, from := range []struct {
				name string
				run  func(func() error) error
			}{{"outside", ext.in()}, {"a pod", p.in()}, {"the node", local}} {
				eventually(t, "the NodePort does not answer at the node's own address, from "+from.name, func() bool {
					return answer(t, from.run, f.node, "7000") != ""
				})
				before := counter(t, tables, CounterService)
				eventually(t, "a connection to the egress IP is neither dropped nor answered, from "+from.name, func() bool {
					if got := answer(t, from.run, f.egress, "7000"); got != "" {
						t.Errorf("the NodePort answers at the egress IP, from %s", from.name)
						return true
					}
					return counter(t, tables, CounterService) > before
				})
			}
			if !ext.ok("ping -c1 -W0.5 " + f.egress) {
				t.Error("the egress IP answers no echo request")
			}
		})
	}
}

// Of two chains of NAT at one priority the later one is called first, and the kernel takes no lower priority than the
// address guard's. `egret check` names who is there.
func TestADNATThatComesBeforeTheAddressGuardIsAService(t *testing.T) {
	for _, f := range bothSides {
		t.Run(f.egress, func(t *testing.T) {
			ext, p := ownGateway(t, f, "")
			p.serve(f.pod)
			lb := func(priority int) {
				nft(t, fmt.Sprintf("add table inet lb; delete table inet lb; table inet lb { chain pre { type nat hook prerouting priority %d; udp dport 7000 dnat %s to %s; }; }",
					priority, map[bool]string{false: "ip", true: "ip6"}[f.egressIP().Is6()], f.pod))
			}
			for priority, want := range map[int]bool{-198: false, -199: true} {
				lb(priority)
				if got := answer(t, ext.in(), f.egress, "7000") != ""; got != want {
					t.Errorf("at priority %d: answered %v, want %v", priority, got, want)
				}
			}
		})
	}
}

// What a node sends is checked where it arrives: it sends by the egresses that select pods of its own, in its own name.
func TestANodeSendsByItsOwnEgressesOnly(t *testing.T) {
	for i, f := range bothSides {
		ends := [][2]string{{"10.11.0.101", "10.11.0.102"}, {"fd11::101", "fd11::102"}}[i]
		t.Run(f.pod, func(t *testing.T) { testSenders(t, f, netip.MustParseAddr(ends[0]), netip.MustParseAddr(ends[1])) })
	}
}

func testSenders(t *testing.T, f sides, here, there netip.Addr) {
	netns.Enter(t) // a node without tables: what it would not send by itself is sent here
	ext := outside(t)
	gw := remoteGateway(t, ext, here, there)
	far := gw.tables()
	source := func(node int, id egress.ID) netip.Addr { return egress.OverlaySource(node, id, f.egressIP()) }
	pod, node3 := netip.MustParseAddr(f.pod), here.Next().Next()
	state := fmt.Sprintf("mtu 1430\nself %s\nnode %s\nnode %s\nhosted 5 %s 0x3fff\nhosted 6 %[4]s 0x3fff\n", there, here, node3, f.egress)
	senders := fmt.Sprintf("sender %s %s 5\nsender %s %s 5\nsender %[3]s %[5]s 6\n", here, source(1, 5), node3, source(3, 5), source(3, 6))
	reach(t, far, parseState(t, state+senders))
	if err := far.Permit([]Permit{{IP: f.egressIP()}}, time.Hour); err != nil {
		t.Fatal(err)
	}
	send := func(i inner) func() {
		return func() {
			if err := udp(netip.Addr{}, there, int(egress.OverlayPort), i.vxlan(f.server)); err != nil {
				t.Fatal(err)
			}
		}
	}
	right := inner{node: here, to: there, pod: source(1, 5), id: 5}
	arrives := func() bool {
		var c net.PacketConn
		ext.do(func() (err error) { c, err = net.ListenPacket("udp", net.JoinHostPort(f.server, "7002")); return err })
		defer c.Close()
		send(right)()
		if err := c.SetReadDeadline(time.Now().Add(time.Second)); err != nil {
			t.Fatal(err)
		}
		_, from, err := c.ReadFrom(make([]byte, 2000))
		return err == nil && netip.MustParseAddrPort(from.String()).Addr() == f.egressIP()
	}
	if !arrives() {
		t.Fatal("what a node with pods of the egress sends does not leave with the egress IP")
	}
	for _, a := range []struct {
		name, counter string
		inner
	}{
		{"a node without pods of the egress", CounterSender, inner{node: here, to: there, pod: source(1, 6), id: 6}},
		{"by one egress, with the source of another", CounterSender, inner{node: here, to: there, pod: source(1, 6), id: 5}},
		{"an id that is not here", CounterSender, inner{node: here, to: there, pod: source(1, 7), id: 7}},
		{"no id, said to be one", CounterInvalid, inner{node: here, to: there, pod: source(1, 5)}},
		{"no id", CounterInvalid, inner{node: here, to: there, pod: source(1, 5), plain: true}},
		{"an id that is not told to be one", CounterSender, inner{node: here, to: there, pod: source(1, 5), id: 5, plain: true}},
		{"a routing mark as the id", CounterSender, inner{node: here, to: there, pod: source(1, 5), id: egress.ID(egress.LocalMark), plain: true}},
		{"another node's source", CounterSender, inner{node: here, to: there, pod: source(3, 5), id: 5}},
		{"another node's source, in that node's name", CounterForeign, inner{node: node3, to: there, pod: source(3, 5), id: 5}},
		{"a pod's own address", CounterSender, inner{node: here, to: there, pod: pod, id: 5}},
		{"a host outside", CounterSender, inner{node: here, to: there, pod: netip.MustParseAddr(f.lan), id: 5}},
		{"the egress IP itself", CounterSender, inner{node: here, to: there, pod: f.egressIP(), id: 5}},
	} {
		counts(t, far, a.counter, func() { sneaks(t, a.name, ext, f, send(a.inner)) })
	}
	s := parseState(t, state)
	s.KeepSenders = true
	reach(t, far, s)
	if !arrives() {
		t.Error("a node of which it is not known whether it still has pods of the egress is cut off")
	}
	reach(t, far, parseState(t, state))
	counts(t, far, CounterSender, func() {
		sneaks(t, "an open connection of a node that has no more pods of the egress", ext, f, send(right))
	})
}
