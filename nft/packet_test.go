package nft

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mdlayher/arp"
	"github.com/mdlayher/packet"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/netns"
)

// space is a named network namespace, for the other hosts of a test: the test's own, unnamed one is the first node.
type space struct {
	t    testing.TB
	name string
}

func newSpace(t testing.TB, name string) space {
	t.Helper()
	s := space{t, fmt.Sprintf("egnft-%d-%s", os.Getpid(), name)}
	netns.Run(t, "ip netns add "+s.name)
	t.Cleanup(func() { netns.Run(t, "ip netns del "+s.name) })
	s.run(`sysctl -qw net.ipv6.conf.default.accept_dad=0
		ip link set lo up`)
	return s
}

// run runs lines of commands in the namespace.
func (s space) run(lines string) {
	s.t.Helper()
	netns.RunAll(s.t, s.name, lines)
}

// ok reports whether a command in the namespace succeeds.
func (s space) ok(line string) bool {
	s.t.Helper()
	return netns.OK(s.t, s.name, line)
}

// do runs f in the namespace, as netns.Do.
func (s space) do(f func() error) {
	s.t.Helper()
	if err := netns.Do(s.name, f); err != nil {
		s.t.Fatal(err)
	}
}

// tables returns Tables in the namespace.
func (s space) tables() (tables *Tables) {
	s.t.Helper()
	s.do(func() (err error) { tables, err = New(Config{}); return err })
	s.t.Cleanup(func() { tables.Close() })
	return tables
}

// serve answers every UDP datagram at port 7000 of the addresses with the address that it came from.
func (s space) serve(ips ...string) { s.serveAt("7000", ips...) }

func (s space) serveAt(port string, ips ...string) {
	s.t.Helper()
	for _, ip := range ips {
		var c net.PacketConn
		s.do(func() (err error) { c, err = net.ListenPacket("udp", net.JoinHostPort(ip, port)); return err })
		s.t.Cleanup(func() { c.Close() })
		go answerAll(c)
	}
}

// answerAll answers every datagram with the address that it came from, until the connection is closed.
func answerAll(c net.PacketConn) {
	b := make([]byte, 100)
	for {
		_, from, err := c.ReadFrom(b)
		if err != nil {
			return
		}
		c.WriteTo([]byte(netip.MustParseAddrPort(from.String()).Addr().Unmap().String()), from)
	}
}

// seen sends a datagram to the server at ip and returns the source that the server saw; "" when no answer comes, also
// when it is asked again: a busy machine is late.
func (s space) seen(ip string) (source string) {
	s.t.Helper()
	for range 5 {
		if source = s.seenAtOnce(ip); source != "" {
			break
		}
	}
	return source
}

// seenAtOnce is seen by a single datagram, for what is to have no answer.
func (s space) seenAtOnce(ip string) string {
	s.t.Helper()
	return answer(s.t, s.in(), ip, "7000")
}

// answer is as seen, from where run runs what it is given.
func answer(t testing.TB, run func(func() error) error, ip, port string) string {
	t.Helper()
	got := ""
	err := run(func() error {
		c, err := net.Dial("udp", net.JoinHostPort(ip, port))
		if err != nil {
			return err
		}
		defer c.Close()
		b := make([]byte, 100)
		if err := c.SetDeadline(time.Now().Add(300 * time.Millisecond)); err != nil {
			return err
		}
		c.Write([]byte("?")) // what is lost, or refused, shows as no answer
		n, _ := c.Read(b)
		got = string(b[:n])
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// whoHas asks for ip once, by broadcast on eth0 and in the name of asker, and returns the replies that come within a
// while.
func (s space) whoHas(ip, asker string) string {
	s.t.Helper()
	var replies []string
	s.do(func() error {
		ifi, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		c, err := packet.Listen(ifi, packet.Datagram, unix.ETH_P_ARP, nil)
		if err != nil {
			return err
		}
		defer c.Close()
		q, err := arp.NewPacket(arp.OperationRequest, ifi.HardwareAddr, netip.MustParseAddr(asker), make(net.HardwareAddr, 6), netip.MustParseAddr(ip))
		if err != nil {
			return err
		}
		b, err := q.MarshalBinary()
		if err != nil {
			return err
		}
		if _, err := c.WriteTo(b, &packet.Addr{HardwareAddr: net.HardwareAddr{255, 255, 255, 255, 255, 255}}); err != nil {
			return err
		}
		for b := make([]byte, 100); ; {
			if err := c.SetReadDeadline(time.Now().Add(150 * time.Millisecond)); err != nil {
				return err
			}
			n, _, err := c.ReadFrom(b)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				return nil
			} else if err != nil {
				return err
			}
			var p arp.Packet
			if err := p.UnmarshalBinary(b[:n]); err == nil && p.Operation == arp.OperationReply {
				replies = append(replies, fmt.Sprintf("%s is at %s", p.SenderIP, p.SenderHardwareAddr))
			}
		}
	})
	return strings.Join(replies, ", ")
}

func counter(t testing.TB, tables *Tables, name string) uint64 {
	t.Helper()
	all, err := tables.Counters()
	if err != nil {
		t.Fatal(err)
	}
	n, ok := all[name]
	if !ok {
		t.Errorf("no counter %s in %v", name, all)
	}
	return n
}

// counts fails the test unless f makes the counter grow.
func counts(t testing.TB, tables *Tables, name string, f func()) {
	t.Helper()
	before := counter(t, tables, name)
	f()
	eventually(t, fmt.Sprintf("%s stays at %d", name, before), func() bool { return counter(t, tables, name) > before })
}

// outside makes an external host, linked to the namespace of the calling thread by eth0: 10.10.0.200 and 203.0.113.10
// there, 10.10.0.101 here.
func outside(t testing.TB) space {
	t.Helper()
	ext := newSpace(t, "ext")
	netns.RunAll(t, "", `ip link add eth0 type veth peer name eth0 netns `+ext.name+`
		ip link set eth0 up
		ip addr add 10.10.0.101/24 dev eth0
		ip addr add fd10::101/64 dev eth0 nodad
		ip route add default via 10.10.0.200
		ip -6 route add default via fd10::200
		sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1`)
	ext.run(`ip link set eth0 up
		ip addr add 10.10.0.200/24 dev eth0
		ip addr add fd10::200/64 dev eth0 nodad
		ip addr add 203.0.113.10/32 dev lo
		ip addr add 2001:db8::10/128 dev lo nodad`)
	return ext
}

// cni is how a CNI masquerades what leaves the pods' network.
const cni = `table inet cni { chain post { type nat hook postrouting priority 100;
	ip saddr 10.244.0.0/16 ip daddr != 10.244.0.0/16 masquerade; ip6 saddr fd44::/16 ip6 daddr != fd44::/16 masquerade; }; }`

// pod makes a pod, linked to the namespace of the calling thread as a CNI does it, which masquerades what leaves the
// pods' network.
func pod(t testing.TB) space {
	t.Helper()
	p := newSpace(t, "pod")
	netns.RunAll(t, "", `ip link add cni0 type veth peer name eth0 netns `+p.name+`
		ip link set cni0 up
		ip addr add 10.244.1.1/24 dev cni0
		ip addr add fd44:1::1/64 dev cni0 nodad`)
	nft(t, cni)
	p.run(`ip link set eth0 up
		ip addr add 10.244.1.2/24 dev eth0
		ip addr add fd44:1::2/64 dev eth0 nodad
		ip route add default via 10.244.1.1
		ip -6 route add default via fd44:1::1`)
	return p
}

const server = "203.0.113.10"

// sides are the addresses of the hosts above in one family.
type sides struct {
	server, lan, egress, node, pod, gateway, pods string
	fast                                          bool // with the fast path, on nodes that have blocks
}

var bothSides = []sides{
	{server, "10.10.0.200", "10.10.0.8", "10.10.0.101", "10.244.1.2", "10.244.1.1", "10.244.0.0/16", false},
	{"2001:db8::10", "fd10::200", "fd10::8", "fd10::101", "fd44:1::2", "fd44:1::1", "fd44::/16", false},
}

func (f sides) egressIP() netip.Addr { return netip.MustParseAddr(f.egress) }

// base are the lines of a State in which the hosts outside are reached with the egress IP, but for lan.
func (f sides) base() string {
	lan := netip.MustParseAddr(f.lan)
	return fmt.Sprintf("except %s\nexcept %s\naddressguard %s\n", f.pods, netip.PrefixFrom(lan, lan.BitLen()), f.egress)
}

// addEgressIP puts the egress IP on a link. The kernel answers neighbor solicitations for addresses of that link alone.
func (f sides) addEgressIP(t testing.TB) {
	netns.Run(t, "ip addr add "+f.egress+" dev eth0 preferred_lft 0")
}

// The permit is the lock that also binds a frozen agent: without it, the node is silent about the address.
func TestWithoutPermitNobodyAnswersForTheIP(t *testing.T) {
	tables := open(t)
	ext := outside(t)
	netns.Run(t, "ip addr add 10.10.0.8/32 dev lo")
	netns.Run(t, "ip addr add fd10::8/128 dev eth0 nodad")
	reach(t, tables, parseState(t, "addressguard 10.10.0.8\naddressguard fd10::8"))

	arping := func() bool { return ext.ok("arping -q -c1 -w1 -I eth0 10.10.0.8") }
	ping6 := func() bool {
		ext.run("ip -6 neigh flush dev eth0")
		return ext.ok("ping -6 -c1 -W0.3 fd10::8")
	}
	silent := func(when string) {
		t.Helper()
		counts(t, tables, CounterARP, func() {
			if arping() {
				t.Errorf("%s: ARP is answered", when)
			}
		})
		counts(t, tables, CounterNDP, func() {
			if ping6() {
				t.Errorf("%s: NDP is answered", when)
			}
		})
	}
	grant := func(answer bool, d time.Duration) {
		t.Helper()
		if err := tables.Permit([]Permit{{ip4, answer}, {ip6, answer}}, d); err != nil {
			t.Fatal(err)
		}
	}
	silent("never permitted")
	grant(true, time.Hour)
	if !arping() || !ping6() {
		t.Error("permitted: no answer")
	}
	if err := tables.RevokeAnswer(ip4, ip6); err != nil {
		t.Fatal(err)
	}
	silent("revoked")
	grant(false, time.Hour)
	silent("permitted to send only")
	grant(true, 200*time.Millisecond)
	eventually(t, "the permit is still there", func() bool { return len(permits(t, tables)) == 0 })
	silent("expired")
	if !ext.ok("arping -q -c1 -w1 -I eth0 10.10.0.101") || !ext.ok("ping -6 -c1 -W0.3 fd10::101") {
		t.Error("the node does not answer for its own address")
	}
}

// The tables answer before the kernel: one answer with a permit and none without, whatever arp_ignore makes the kernel
// do.
func TestARPIsAnsweredOnceWhateverTheSysctls(t *testing.T) {
	tables := open(t)
	ext := outside(t)
	netns.Run(t, "ip link set eth0 address 02:00:00:00:00:01")
	netns.Run(t, "ip addr add 10.10.0.8/32 dev lo")
	netns.Run(t, "ip addr add 10.10.0.9/32 dev lo")
	state := parseState(t, "addressguard 10.10.0.8\naddressguard 10.10.0.9\ncarrier eth0 02:00:00:00:00:01 10.10.0.8")
	reach(t, tables, state)
	grant := func(ip string, answer bool, d time.Duration) {
		t.Helper()
		if err := tables.Permit([]Permit{{netip.MustParseAddr(ip), answer}}, d); err != nil {
			t.Fatal(err)
		}
	}
	const here, nobody, asker = "10.10.0.8 is at 02:00:00:00:00:01", "0.0.0.0", "10.10.0.200"
	for _, ignore := range []string{"0", "1", "2", "8"} {
		if err := tables.Revoke(netip.MustParseAddr("10.10.0.9")); err != nil {
			t.Fatal(err)
		}
		netns.Run(t, "sysctl -qw net.ipv4.conf.all.arp_ignore="+ignore)
		netns.Run(t, "sysctl -qw net.ipv4.conf.all.arp_announce=2")
		want := func(want, when, asker, ip string) {
			t.Helper()
			if got := ext.whoHas(ip, asker); got != want {
				t.Errorf("arp_ignore=%s, %s: answers %q, want %q", ignore, when, got, want)
			}
		}
		want("", "without a permit", asker, "10.10.0.8")
		grant("10.10.0.8", true, time.Hour)
		want(here, "with a permit", asker, "10.10.0.8")
		want(here, "to a probe of RFC 5227", nobody, "10.10.0.8")
		if err := tables.RevokeAnswer(ip4); err != nil {
			t.Fatal(err)
		}
		want("", "revoked", asker, "10.10.0.8")
		grant("10.10.0.8", true, 100*time.Millisecond)
		eventually(t, "the permit is still there", func() bool { return len(permits(t, tables)) == 0 })
		want("", "expired, as when the agent is frozen", asker, "10.10.0.8")
		grant("10.10.0.9", true, time.Hour)
		if got := ext.whoHas("10.10.0.9", asker); ignore != "0" && got != "" {
			t.Errorf("arp_ignore=%s: an address that the link does not carry is answered for: %q", ignore, got)
		}
	}
	netns.Run(t, "sysctl -qw net.ipv4.conf.all.arp_ignore=1")
	if !ext.ok("ping -c1 -w5 10.10.0.101") {
		t.Error("the node is not reached at its own address")
	}
}

// What leaves a node with an egress IP of its own, and what does not.
func TestLocalGateway(t *testing.T) {
	for _, f := range bothSides {
		t.Run(f.pod, func(t *testing.T) { testLocalGateway(t, f) })
	}
}

func testLocalGateway(t *testing.T, f sides) {
	tables := open(t)
	ext, p := outside(t), pod(t)
	ext.serve(f.server, f.lan)
	f.addEgressIP(t)
	selected := f.base() + "pod " + f.pod + " 5\n"
	hosted := selected + "nexthop 5 0x3fff\nhosted 5 " + f.egress + " 0x3fff\n"
	grant := func() {
		t.Helper()
		if err := tables.Permit([]Permit{{f.egressIP(), true}}, time.Hour); err != nil {
			t.Fatal(err)
		}
	}
	reach(t, tables, parseState(t, f.base()))
	grant()
	if got := p.seen(f.server); got != f.node {
		t.Errorf("not selected: source %q, want the CNI's", got)
	}
	reach(t, tables, parseState(t, hosted))
	if got := p.seen(f.server); got != f.egress {
		t.Errorf("selected: source %q, want the egress IP", got)
	}
	overlayPort := fmt.Sprint(egress.OverlayPort)
	if ext.serveAt(overlayPort, f.server); answer(t, p.in(), f.server, overlayPort) != f.egress {
		t.Error("selected: what is no node does not see the egress IP at the overlay's port")
	}
	if got := p.seen(f.lan); got != f.node {
		t.Errorf("excepted destination: source %q, want the CNI's", got)
	}
	if !p.ok("ping -c1 -w5 " + f.gateway) {
		t.Error("the pod does not reach its node")
	}
	dropped := func(counter, state, why string) {
		t.Helper()
		reach(t, tables, parseState(t, state))
		counts(t, tables, counter, func() {
			if got := p.seenAtOnce(f.server); got != "" {
				t.Errorf("%s: source %q, want nothing", why, got)
			}
		})
	}
	dropped(CounterNoNextHop, selected, "no gateway")
	dropped(CounterNoNextHop, f.base()+"pod "+f.pod+" 0\n", "no address")
	dropped(CounterGuard, selected+"nexthop 5 0x3fff\n", "steered out of the node, which does not have the IP")
	if err := tables.Revoke(f.egressIP()); err != nil {
		t.Fatal(err)
	}
	dropped(CounterGuard, hosted, "no permit")
	grant()
	if got := p.seen(f.server); got != f.egress {
		t.Errorf("permitted again: source %q, want the egress IP", got)
	}

	// A segment with a wrong checksum is in no connection.
	counts(t, tables, CounterInvalid, func() {
		p.do(func() error {
			to := netip.MustParseAddr(f.server)
			family, addr := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{Addr: to.As16()})
			if to.Is4() {
				family, addr = unix.AF_INET, &unix.SockaddrInet4{Addr: to.As4()}
			}
			fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			return unix.Sendto(fd, []byte{0: 1, 2: 1, 12: 5 << 4, 13: 4, 19: 0}, 0, addr)
		})
		eventually(t, "an invalid segment was not counted", func() bool { return counter(t, tables, CounterInvalid) > 0 })
	})
}

// A pod whose first act is to connect out waits until it is known whether an egress selects it, but not for ever, and
// only once.
func TestSourcePortsStayOrAreRandom(t *testing.T) {
	for _, f := range bothSides {
		t.Run(f.pod, func(t *testing.T) {
			tables := open(t)
			ext, p := outside(t), pod(t)
			var c net.PacketConn
			ext.do(func() (err error) { c, err = net.ListenPacket("udp", net.JoinHostPort(f.server, "7001")); return err })
			defer c.Close()
			go func() {
				b := make([]byte, 100)
				for {
					_, from, err := c.ReadFrom(b)
					if err != nil {
						return // closed
					}
					c.WriteTo([]byte(from.String()), from) // what is lost shows as no answer
				}
			}()
			f.addEgressIP(t)
			const connections = 20
			// What is taken at random may be what it was, and is in the way of who would keep it: so that comes last.
			for _, tt := range []struct {
				lines string
				most  int
			}{{"", connections}, {"random\n", connections / 4}} {
				lines, most := tt.lines, tt.most
				reach(t, tables, parseState(t, f.base()+lines+"pod "+f.pod+" 5\nnexthop 5 0x3fff\nhosted 5 "+f.egress+" 0x3fff\n"))
				if err := tables.Permit([]Permit{{f.egressIP(), true}}, time.Hour); err != nil {
					t.Fatal(err)
				}
				same := 0
				for range connections {
					p.do(func() error {
						d, err := net.Dial("udp", net.JoinHostPort(f.server, "7001"))
						if err != nil {
							return err
						}
						defer d.Close()
						b := make([]byte, 100)
						d.SetDeadline(time.Now().Add(time.Second))
						d.Write([]byte("?"))
						n, err := d.Read(b)
						if err != nil {
							return err
						}
						own, seen := netip.MustParseAddrPort(d.LocalAddr().String()), netip.MustParseAddrPort(string(b[:n]))
						if seen.Addr().Unmap() != f.egressIP() {
							t.Errorf("%q: source %s, want %s", lines, seen, f.egress)
						}
						if seen.Port() == own.Port() {
							same++
						}
						return nil
					})
				}
				if same > most || lines == "" && same < connections {
					t.Errorf("%q: %d of %d connections kept their port", lines, same, connections)
				}
			}
		})
	}
}

func TestTheFirstConnectionOfAnUnknownPodIsDelayed(t *testing.T) {
	const delay = 700 * time.Millisecond
	for _, f := range bothSides {
		t.Run(f.pod, func(t *testing.T) {
			tables := open(t)
			ext, p := outside(t), pod(t)
			ext.serve(f.server, f.lan)
			f.addEgressIP(t)
			base := f.base() + fmt.Sprintf("podcidr %s\nhosted 5 %s 0x3fff\nnexthop 5 0x3fff\n", f.pods, f.egress)
			with := func(lines string) {
				t.Helper()
				reach(t, tables, parseState(t, base+lines))
				if err := tables.Permit([]Permit{{f.egressIP(), true}}, time.Hour); err != nil {
					t.Fatal(err)
				}
			}
			source := func(to, want, when string) {
				t.Helper()
				seen := p.seen
				if want == "" {
					seen = p.seenAtOnce // it is delayed for a moment only
				}
				if got := seen(to); got != want {
					t.Errorf("%s: source %q, want %q", when, got, want)
				}
			}
			with("delay 700ms\n")
			began := time.Now()
			counts(t, tables, CounterUnknown, func() { source(f.server, "", "unknown") })
			source(f.lan, f.node, "unknown, to an excepted destination")
			if !p.ok("ping -c1 -w5 " + f.gateway) {
				t.Error("an unknown pod does not reach its node")
			}
			eventually(t, "an unknown pod is delayed for good", func() bool { return p.seenAtOnce(f.server) == f.node })
			if took := time.Since(began); took < delay*2/3 { // the kernel counts by ticks, which come late on a busy machine
				t.Errorf("delayed for %v, want %v", took, delay)
			}
			source(f.server, f.node, "once more")

			with("delay 700ms\npod " + f.pod + " 5\n")
			source(f.server, f.egress, "selected")
			with("delay 700ms\n") // it goes, and another pod gets its address
			source(f.server, "", "the next pod of the address")
			with("delay 700ms\nknown " + f.pod + "\n")
			source(f.server, f.node, "not selected")
			with("delay 700ms\npod " + f.pod + " 5\n")
			source(f.server, f.egress, "selected after all")
			with("delay 700ms\n")
			source(f.server, "", "the third pod of the address")
			with("")
			source(f.server, f.node, "holding is off")
		})
	}
}

// The egress IP is no way to the node's services, but says that it is alive.
func TestTheEgressIPOffersNoService(t *testing.T) {
	for _, f := range bothSides {
		t.Run(f.egress, func(t *testing.T) {
			tables := open(t)
			ext := outside(t)
			l, err := net.Listen("tcp", ":7000")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			f.addEgressIP(t)
			reach(t, tables, parseState(t, "addressguard "+f.egress))
			if err := tables.Permit([]Permit{{f.egressIP(), true}}, time.Hour); err != nil {
				t.Fatal(err)
			}
			connects := func(ip string, within time.Duration) bool {
				return netns.Do(ext.name, func() error {
					c, err := net.DialTimeout("tcp", net.JoinHostPort(ip, "7000"), within)
					if err == nil {
						c.Close()
					}
					return err
				}) == nil
			}
			if !connects(f.node, 5*time.Second) {
				t.Error("the node's own address offers nothing either")
			}
			if !ext.ok("ping -c1 -w5 " + f.egress) {
				t.Error("the egress IP answers no echo request")
			}
			counts(t, tables, CounterService, func() {
				if connects(f.egress, 300*time.Millisecond) {
					t.Error("connected to the egress IP")
				}
			})
			// Nor is anything passed on while the address is yet to come.
			eth0, err := net.InterfaceByName("eth0")
			if err != nil {
				t.Fatal(err)
			}
			ext.run("ip neigh replace " + f.egress + " dev eth0 nud permanent lladdr " + eth0.HardwareAddr.String())
			netns.Run(t, "ip addr del "+f.egress+" dev eth0")
			counts(t, tables, CounterService, func() { connects(f.egress, 300*time.Millisecond) })
			if got := netns.Run(t, "conntrack -L --orig-dst "+f.egress); strings.Contains(got, "tcp ") {
				t.Errorf("conntrack has a connection to the egress IP:\n%s", got)
			}
		})
	}
}

// What comes to the port of the overlay from a host that is no node goes nowhere.
func TestOnlyNodesAreHeardInTheOverlay(t *testing.T) {
	for _, f := range bothSides {
		t.Run(f.node, func(t *testing.T) {
			tables := open(t)
			ext := outside(t)
			var heard net.PacketConn // in the place of the overlay
			heard, err := net.ListenPacket("udp", net.JoinHostPort("", fmt.Sprint(egress.OverlayPort)))
			if err != nil {
				t.Fatal(err)
			}
			defer heard.Close()
			frame := inner{node: netip.MustParseAddr(f.lan), to: netip.MustParseAddr(f.node), pod: netip.MustParseAddr(f.pod), id: 5}
			says := func() bool {
				ext.do(func() error {
					c, err := net.Dial("udp", net.JoinHostPort(f.node, fmt.Sprint(egress.OverlayPort)))
					if err == nil {
						defer c.Close()
						_, err = c.Write(frame.vxlan(f.server))
					}
					return err
				})
				heard.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
				_, _, err := heard.ReadFrom(make([]byte, 10))
				return err == nil
			}
			reach(t, tables, parseState(t, "self "+f.node+"\nnode "+f.lan))
			if !says() {
				t.Error("a node is not heard")
			}
			frame.node = netip.MustParseAddr(f.gateway)
			counts(t, tables, CounterForeign, func() {
				if says() {
					t.Error("a node is heard that says that it is another one")
				}
			})
			reach(t, tables, parseState(t, "self "+f.node+"\nnode "+f.gateway))
			counts(t, tables, CounterForeign, func() {
				if says() {
					t.Error("a host that is no node is heard")
				}
			})
		})
	}
}

// remote makes the namespace of the calling thread the node of a pod, whose gateway is another node, gw. far are the
// tables there.
func remote(t testing.TB) (tables, far *Tables, ext, p, gw space) {
	t.Helper()
	tables = open(t)
	ext, p = outside(t), pod(t)
	for _, f := range bothSides {
		ext.serve(f.server)
	}
	gw = remoteGateway(t, ext, underlays[0], underlays[1])
	return tables, gw.tables(), ext, p, gw
}

// underlays are the nodes of remote: that of the pod, and the gateway.
var underlays = [2]netip.Addr{netip.MustParseAddr("10.11.0.101"), netip.MustParseAddr("10.11.0.102")}

// A pod's packets on two nodes: out over the overlay, SNATed at the gateway, and back.
func TestRemoteGateway(t *testing.T) {
	tables, far, ext, p, _ := remote(t)
	hosts := "mtu 1450\nself 10.11.0.102\nnode 10.11.0.101\n"
	pods := "mtu 1450\nself 10.11.0.101\nnode 10.11.0.102\n"
	var permits []Permit
	for i, f := range bothSides {
		hosts += f.atGateway(5+i, underlays[0])
		pods += f.atPod(5+i, underlays[1])
		permits = append(permits, Permit{IP: f.egressIP()})
	}
	reach(t, tables, parseState(t, pods))
	reach(t, far, parseState(t, hosts))
	if err := far.Permit(permits, time.Hour); err != nil {
		t.Fatal(err)
	}
	for _, f := range bothSides {
		if got := p.seen(f.server); got != f.egress {
			t.Errorf("source %q, want %s; counters %v", got, f.egress, fmt.Sprint(far.Counters()))
		}
	}

	// An answer to a connection that the pod's node does not know any more goes nowhere.
	for _, f := range bothSides {
		var s net.PacketConn
		ext.do(func() (err error) { s, err = net.ListenPacket("udp", net.JoinHostPort(f.server, "7002")); return err })
		defer s.Close()
		var c net.Conn
		p.do(func() (err error) { c, err = net.Dial("udp", net.JoinHostPort(f.server, "7002")); return err })
		defer c.Close()
		c.Write([]byte("?"))
		s.SetReadDeadline(time.Now().Add(time.Second))
		_, from, err := s.ReadFrom(make([]byte, 100))
		if err != nil {
			t.Fatal(err)
		}
		netns.Run(t, "conntrack -D --orig-dst "+f.server)
		counts(t, tables, CounterInvalid, func() {
			s.WriteTo([]byte("!"), from)
			c.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
			if n, err := c.Read(make([]byte, 100)); err == nil {
				t.Errorf("%d bytes come to %s", n, c.LocalAddr())
			}
		})
		if got := netns.Run(t, "conntrack -L --orig-src "+f.server); strings.Contains(got, "udp ") {
			t.Errorf("conntrack has a connection to the pod:\n%s", got)
		}
	}

	// Two connections from one port to one server, one of them by a Service: the second gets another port, and passes.
	const service = "203.0.113.9"
	netns.Run(t, "nft add table ip service")
	netns.Run(t, "nft add chain ip service prerouting { type nat hook prerouting priority -100; }")
	netns.Run(t, "nft add rule ip service prerouting ip daddr "+service+" dnat to "+bothSides[0].server)
	p.do(func() error {
		from := &net.UDPAddr{Port: 7001}
		for _, to := range []string{bothSides[0].server, service} {
			c, err := (&net.Dialer{LocalAddr: from, Control: reusePort}).Dial("udp", net.JoinHostPort(to, "7000"))
			if err != nil {
				return err
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(time.Second))
			c.Write([]byte("?"))
			b := make([]byte, 100)
			if n, err := c.Read(b); err != nil || string(b[:n]) != bothSides[0].egress {
				t.Errorf("to %s: answer %q, error %v", to, b[:n], err)
			}
		}
		return nil
	})

	// It is not sent into the overlay again.
	s := parseState(t, hosts+"pod 10.244.9.9 5\nnexthop 5 0x3ffe\ngateway 5 1\npod fd44:9::9 6\nnexthop 6 0x3ffe\ngateway 6 1")
	s.Hosted = nil
	reach(t, far, s)
	for _, f := range bothSides {
		counts(t, far, CounterUnhosted, func() {
			if got := p.seenAtOnce(f.server); got != "" {
				t.Errorf("not hosted there: source %q, want nothing", got)
			}
		})
	}
}

// reusePort lets several sockets have one port.
func reusePort(_, _ string, c syscall.RawConn) error {
	var set error
	err := c.Control(func(fd uintptr) { set = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1) })
	return errors.Join(err, set)
}

// anySource lets a socket bind to an address that the host does not have, which needs no right.
func anySource(network, _ string, c syscall.RawConn) error {
	var set error
	err := c.Control(func(fd uintptr) {
		if network == "udp6" {
			set = unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_FREEBIND, 1)
			return
		}
		set = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_FREEBIND, 1)
	})
	return errors.Join(err, set)
}
