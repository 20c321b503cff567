package nft

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/fastpath"
	"github.com/egret-project/egret/internal/netns"
	"github.com/egret-project/egret/routing"
)

// blockSite is three nodes on a LAN with a host outside, the server. Node 1 has the pods a and b, node 2 the pod c; the
// gateway is node 2 or node 3. Every node has a block of 64 ports of the egress IP.
type blockSite struct {
	t      testing.TB
	f      sides
	ext    space
	nodes  map[int]*blockNode
	pods   map[string]space
	gates  int                    // who is the gateway
	random bool                   // ports
	mangle func(int, *State)      // what a test makes of the state of a node
	fast   map[int]*fastpath.Path // by node; nil: the tables do it all
}

type blockNode struct {
	space
	tables *Tables
	router *routing.Router
}

const blockID = egress.ID(5)

func (b *blockSite) underlay(n int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 10, 0, byte(100 + n)})
}

func (b *blockSite) block(n int) egress.Block {
	return egress.Block{IP: b.f.egressIP(), First: uint16(2048 + 1024*n), Size: 64}
}

// blockSides are the families; an emulated machine, where a site takes seconds to be made, has IPv4 alone.
func blockSides() []sides {
	if testing.Short() {
		return bothSides[:1]
	}
	return bothSides
}

func newBlockSite(t testing.TB, f sides) *blockSite {
	t.Helper()
	netns.Enter(t)
	b := &blockSite{t: t, f: f, ext: newSpace(t, "ext"), nodes: map[int]*blockNode{}, pods: map[string]space{}}
	lan := newSpace(t, "lan")
	lan.run("ip link add br0 type bridge\nip link set br0 up")
	// with br_netfilter, it would take off what is behind a packet, as no switch does
	_ = lan.ok("sysctl -qw net.bridge.bridge-nf-call-iptables=0")
	port := func(s space, name string) {
		lan.run(fmt.Sprintf("ip link add %s type veth peer name eth0 netns %s\nip link set %[1]s master br0 up", name, s.name))
		s.run("ip link set eth0 up")
	}
	port(b.ext, "ext")
	b.ext.run(`ip addr add 10.10.0.200/24 dev eth0
		ip addr add fd10::200/64 dev eth0 nodad
		ip addr add 203.0.113.10/32 dev lo
		ip addr add 2001:db8::10/128 dev lo nodad`)
	for n := 1; n <= 3; n++ {
		s := newSpace(t, fmt.Sprint("node", n))
		port(s, fmt.Sprint("node", n))
		s.run(fmt.Sprintf(`ip addr add 10.10.0.10%[1]d/24 dev eth0
			ip addr add fd10::10%[1]d/64 dev eth0 nodad
			ip route add default via 10.10.0.200
			ip -6 route add default via fd10::200
			sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv4.conf.all.rp_filter=1 net.ipv4.conf.eth0.rp_filter=1
			ip link add egret0 type bridge`, n))
		node := &blockNode{space: s, tables: s.tables()}
		s.do(func() (err error) { node.router, err = routing.New(routing.Config{}); return err })
		t.Cleanup(node.router.Close)
		b.nodes[n] = node
	}
	b.pod("a", 1, 2)
	b.pod("b", 1, 3)
	b.pod("c", 2, 2)
	b.gates = 3
	if f.fast {
		b.hasten()
	}
	b.reach()
	return b
}

// pod makes a pod of a node, as a CNI does it, which masquerades what leaves the pods' network.
func (b *blockSite) pod(name string, node, host int) {
	p, n := newSpace(b.t, name), b.nodes[node]
	n.run(fmt.Sprintf(`ip link add pod%[1]s type veth peer name eth0 netns %[2]s
		ip link set pod%[1]s up
		sysctl -qw net.ipv4.conf.pod%[1]s.proxy_arp=1 net.ipv4.conf.pod%[1]s.rp_filter=1 net.ipv4.neigh.pod%[1]s.proxy_delay=0
		ip addr add fe80::1/64 dev pod%[1]s nodad
		ip route add 10.244.%[3]d.%[4]d/32 dev pod%[1]s
		ip -6 route add fd44:%[3]d::%[4]d/128 dev pod%[1]s`, name, p.name, node, host))
	p.run(fmt.Sprintf(`ip link set eth0 up
		ip addr add 10.244.%[1]d.%[2]d/32 dev eth0
		ip addr add fd44:%[1]d::%[2]d/128 dev eth0 nodad
		ip route add 169.254.1.1/32 dev eth0
		ip route add default via 169.254.1.1 dev eth0
		ip -6 route add default via fe80::1 dev eth0`, node, host))
	if !n.ok("nft list table inet cni") {
		n.run("nft add table inet cni")
		n.run("nft add chain inet cni post { type nat hook postrouting priority 100; }")
		n.run("nft add rule inet cni post ip saddr 10.244.0.0/16 ip daddr != 10.244.0.0/16 masquerade")
		n.run("nft add rule inet cni post ip6 saddr fd44::/16 ip6 daddr != fd44::/16 masquerade")
	}
	b.pods[name] = p
}

func (b *blockSite) podAddress(name string) netip.Addr {
	at := map[string]string{"a": "1 2", "b": "1 3", "c": "2 2"}[name]
	node, host, _ := strings.Cut(at, " ")
	if b.f.egressIP().Is4() {
		return netip.MustParseAddr("10.244." + node + "." + host)
	}
	return netip.MustParseAddr("fd44:" + node + "::" + host)
}

// state is what a node has in its tables.
func (b *blockSite) state(n int) State {
	ip := b.f.egressIP()
	s := State{
		Self: b.underlay(n), OverlayMTU: 1450, Sources: []netip.Addr{ip}, Pooled: []netip.Addr{ip}, RandomPorts: b.random,
		Pods: map[netip.Addr]egress.ID{}, Peers: map[int]netip.Addr{}, Blocks: map[egress.ID]egress.Block{blockID: b.block(n)},
		NextHops: map[egress.ID]egress.Mark{blockID: egress.ToGatewayMark}, Gateways: map[egress.ID]int{blockID: b.gates},
		OverlaySources: map[egress.ID]netip.Addr{blockID: egress.OverlaySource(n, blockID, ip)},
		Except:         []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd44::/16")},
	}
	for peer := range b.nodes {
		if peer != n {
			s.Nodes, s.Peers[peer] = append(s.Nodes, b.underlay(peer)), b.underlay(peer)
		}
	}
	switch n {
	case 1:
		s.Pods[b.podAddress("a")], s.Pods[b.podAddress("b")] = blockID, blockID
	case 2:
		s.Pods[b.podAddress("c")] = blockID
	}
	if n != 1 { // both may be the gateway, and forward while a move settles
		s.Hosted = map[egress.ID]Hosted{blockID: {IP: ip, Mark: egress.LocalMark, Shared: true}}
		for peer := range b.nodes {
			if peer != n {
				s.Ports = append(s.Ports, Port{b.block(peer), peer, b.underlay(peer)})
				s.Senders = append(s.Senders, Sender{b.underlay(peer), egress.OverlaySource(peer, blockID, ip), blockID})
			}
		}
	}
	if n == b.gates {
		s.NextHops[blockID], s.Gateways, s.OverlaySources, s.AddressGuard = egress.LocalMark, nil, nil, []netip.Addr{ip}
	}
	if b.mangle != nil {
		b.mangle(n, &s)
	}
	return s
}

// reach makes the kernels of all nodes what they are to be, and the neighbours know who the gateway is.
func (b *blockSite) reach() {
	b.t.Helper()
	ip := b.f.egressIP()
	for n, node := range b.nodes {
		want := routing.State{Overlay: routing.Overlay{Local: b.underlay(n), MTU: 1450}, Pods: []netip.Prefix{
			netip.MustParsePrefix(fmt.Sprintf("10.244.%d.0/24", n)), netip.MustParsePrefix(fmt.Sprintf("fd44:%d::/64", n))}}
		for peer := range b.nodes {
			if peer != n {
				want.Peers = append(want.Peers, routing.Peer{Underlay: b.underlay(peer)})
			}
		}
		if n != 1 {
			want.Forwarded = []netip.Addr{ip}
			want.Sources = []netip.Addr{b.underlay(n), netip.MustParseAddr(fmt.Sprintf("fd10::10%d", n))}
		}
		if n == b.gates {
			want.Addresses = map[netip.Addr]string{ip: "egret0"}
			b.own(node, ip)
		}
		node.do(func() error { return route(node.router, want) })
		b.hurry(n, true)
		node.do(func() error { reach(b.t, node.tables, b.state(n)); return nil })
		b.hurry(n, false)
		if n == b.gates {
			if err := node.tables.Permit([]Permit{{ip, true}}, time.Hour); err != nil {
				b.t.Fatal(err)
			}
			b.permitFast(n, time.Hour)
		} else {
			_ = node.ok(fmt.Sprintf("ip addr del %s dev egret0", netip.PrefixFrom(ip, ip.BitLen())))
		}
	}
	mac := strings.Fields(b.output(b.nodes[b.gates].space, "ip -br link show dev eth0"))[2]
	b.ext.run(fmt.Sprintf("ip neigh replace %s lladdr %s dev eth0 nud permanent", ip, mac))
}

// own gives a node an egress IP as an address. The kernel's own route to it, which a worker of the kernel makes for IPv6,
// is waited for: routing takes it away once, and one that comes later is for who watches.
func (b *blockSite) own(node *blockNode, ip netip.Addr) {
	b.t.Helper()
	if !node.ok(fmt.Sprintf("ip addr add %s dev egret0", netip.PrefixFrom(ip, ip.BitLen()))) {
		return // it has it
	}
	show := "ip route show table local type local " + ip.String()
	if ip.Is6() {
		show = "ip -6" + strings.TrimPrefix(show, "ip")
	}
	for end := time.Now().Add(10 * time.Second); b.output(node.space, show) == ""; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			b.t.Fatalf("the kernel made no local route to %s", ip)
		}
	}
}

// route makes the routes of the namespace of the calling thread what they are to be.
func route(r *routing.Router, want routing.State) error {
	have, err := r.Observe()
	if err != nil {
		return err
	}
	return r.Apply(routing.Diff(have, want))
}

func (b *blockSite) output(s space, line string) (out string) {
	b.t.Helper()
	s.do(func() error {
		f := strings.Fields(line)
		o, err := exec.Command(f[0], f[1:]...).CombinedOutput()
		out = string(o)
		if err != nil {
			return fmt.Errorf("%s: %w\n%s", line, err, o)
		}
		return nil
	})
	return out
}

// listenTCP accepts connections at a port of the server. Each is told where it comes from, and then what comes by push.
func (b *blockSite) listenTCP(port int) (conns chan net.Conn) {
	b.t.Helper()
	var l net.Listener
	b.ext.do(func() (err error) {
		l, err = net.Listen("tcp", net.JoinHostPort(b.f.server, strconv.Itoa(port)))
		return err
	})
	b.t.Cleanup(func() { l.Close() })
	conns = make(chan net.Conn, 2000)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			conns <- c // before its pod can know
			fmt.Fprintln(c, c.RemoteAddr())
		}
	}()
	return conns
}

// dial opens a TCP connection from a pod, from a port (0: any), and returns where the server sees it come from.
func (b *blockSite) dial(pod string, from, to int) (c net.Conn, seen netip.AddrPort) {
	b.t.Helper()
	b.pods[pod].do(func() (err error) {
		d := net.Dialer{Timeout: 2 * time.Second}
		if from != 0 {
			d.LocalAddr = &net.TCPAddr{Port: from}
		}
		c, err = d.Dial("tcp", net.JoinHostPort(b.f.server, strconv.Itoa(to)))
		return err
	})
	b.t.Cleanup(func() { c.Close() })
	return c, netip.MustParseAddrPort(b.line(c))
}

func (b *blockSite) line(c net.Conn) string {
	b.t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(2 * time.Second)); err != nil {
		b.t.Fatal(err)
	}
	var out strings.Builder
	for one := make([]byte, 1); ; {
		if _, err := c.Read(one); err != nil {
			b.t.Fatalf("after %q: %v", out.String(), err)
		}
		if one[0] == '\n' {
			return out.String()
		}
		out.WriteByte(one[0])
	}
}

// inBlock fails the test unless what the server sees is of the block of a node.
func (b *blockSite) inBlock(what string, seen netip.AddrPort, node int) {
	b.t.Helper()
	block := b.block(node)
	if seen.Addr().Unmap() != b.f.egressIP() || seen.Port() < block.First || seen.Port() > block.Last() {
		b.t.Errorf("%s: seen as %s, want a port of %s from %d to %d", what, seen, block.IP, block.First, block.Last())
	}
}

// inNoBlock fails the test unless what the server sees has a port that is left for what has no block.
func (b *blockSite) inNoBlock(what string, seen netip.AddrPort) {
	b.t.Helper()
	if seen.Addr().Unmap() != b.f.egressIP() || seen.Port() < egress.StatefulPort || seen.Port() >= egress.FirstBlockPort {
		b.t.Errorf("%s: seen as %s, want a port of the egress IP that is of no block", what, seen)
	}
}

// without makes a node one for which there are no ports left.
func (b *blockSite) without(node int) {
	b.mangle = func(n int, s *State) {
		if n == node {
			s.Blocks = nil
		}
		s.Ports = slices.DeleteFunc(s.Ports, func(p Port) bool { return p.Index == node })
	}
}

// A connection outlives its gateway: what is known of it is on the pod's node. The server pushes; the pods say nothing.
func TestConnectionsOutliveTheirGateway(t *testing.T) {
	for _, f := range withFastPath() {
		t.Run(f.name(), func(t *testing.T) {
			b := newBlockSite(t, f)
			accepted := b.listenTCP(7001)
			each := 20
			if testing.Short() { // on an emulated machine
				each = 5
			}
			conns := map[net.Conn]string{}
			for i := range each {
				for _, pod := range []string{"a", "b", "c"} {
					c, seen := b.dial(pod, 30000+i, 7001) // all pods from the same ports
					b.inBlock("a connection of "+pod, seen, map[string]int{"a": 1, "b": 1, "c": 2}[pod])
					conns[c] = pod
				}
			}
			push := func(text string) {
				t.Helper()
				for range conns {
					c := <-accepted
					if _, err := fmt.Fprintln(c, text); err != nil {
						t.Errorf("pushing %s: %v", text, err)
					}
					accepted <- c
				}
				for c, pod := range conns {
					if got := b.line(c); got != text {
						t.Errorf("pod %s got %q, want %q", pod, got, text)
					}
				}
			}
			push("before")
			known := func(n int) string {
				return b.output(b.nodes[n].space, "conntrack -L -d "+f.server)
			}
			if out := known(3); strings.Contains(out, "ESTABLISHED") {
				t.Errorf("the gateway knows connections:\n%s", out)
			}
			b.nodes[3].run("ip link set eth0 down") // the power goes
			b.gates = 2
			delete(b.nodes, 3)
			b.reach()
			push("after")
			if out := known(2); strings.Count(out, "ESTABLISHED") != each {
				t.Errorf("the new gateway knows more connections than those of its own pod, %d:\n%s", each, out)
			}
			c, seen := b.dial("a", 0, 7001)
			b.inBlock("a new connection", seen, 1)
			c.Close()
		})
	}
}

// What has no TCP gets back to the pod as well: datagrams, large ones in fragments both ways, pings, and errors of the
// server, of a router and of the gateway.
func TestWhatIsNoTCPFindsItsWayBack(t *testing.T) {
	for _, f := range withFastPath() {
		t.Run(f.name(), func(t *testing.T) {
			b := newBlockSite(t, f)
			for name, tt := range map[string]struct {
				gateway int
				without bool // a block
			}{
				"another node is the gateway":                   {gateway: 3},
				"its own node is the gateway":                   {gateway: 2},
				"another node is the gateway, and translates":   {gateway: 3, without: true},
				"its own node is the gateway, and has no block": {gateway: 2, without: true},
			} {
				t.Run(name, func(t *testing.T) {
					gateway := tt.gateway
					b.gates, b.mangle = gateway, nil
					if tt.without {
						b.without(2)
					}
					b.reach()
					b.output(b.nodes[2].space, "conntrack -F") // as the agent does where the gateway is another
					pod := b.pods["c"]
					if !pod.ok("ping -c1 -w3 " + f.server) {
						t.Error("no answer to a ping")
					}
					var server net.PacketConn
					b.ext.do(func() (err error) {
						server, err = net.ListenPacket("udp", net.JoinHostPort(f.server, "7002"))
						return err
					})
					defer server.Close()
					seen := make(chan netip.AddrPort, 100)
					go func() {
						buf := make([]byte, 1<<16)
						for {
							n, from, err := server.ReadFrom(buf)
							if err != nil {
								return
							}
							seen <- netip.MustParseAddrPort(from.String())
							server.WriteTo(buf[:n], from) // what is lost shows as no answer
						}
					}()
					talk := func(size int) error {
						var got int
						err := netns.Do(pod.name, func() error {
							c, err := net.Dial("udp", net.JoinHostPort(f.server, "7002"))
							if err != nil {
								return err
							}
							defer c.Close()
							for range 4 { // the path's MTU is learned on the way, on both ends
								if err := c.SetDeadline(time.Now().Add(500 * time.Millisecond)); err != nil {
									return err
								}
								if _, err = c.Write(make([]byte, size)); err == nil {
									got, err = c.Read(make([]byte, 1<<16))
								}
								if err == nil {
									break
								}
							}
							return err
						})
						if err == nil && got != size {
							err = fmt.Errorf("%d bytes come back of %d", got, size)
						}
						return err
					}
					for _, size := range []int{1, 4000} {
						if err := talk(size); err != nil {
							t.Errorf("%d bytes: %v", size, err)
							continue
						}
						if what := fmt.Sprintf("a datagram of %d bytes", size); tt.without {
							b.inNoBlock(what, <-seen)
						} else {
							b.inBlock(what, <-seen, 2)
						}
					}
					refused := func() error {
						return netns.Do(pod.name, func() error {
							c, err := net.Dial("udp", net.JoinHostPort(f.server, "9"))
							if err != nil {
								return err
							}
							defer c.Close()
							c.Write([]byte("?"))
							if err := c.SetReadDeadline(time.Now().Add(2 * time.Second)); err != nil {
								return err
							}
							_, err = c.Read(make([]byte, 10))
							return err
						})
					}
					if err := refused(); !errors.Is(err, syscall.ECONNREFUSED) {
						t.Errorf("a closed port: %v, want that it is said", err)
					}
					// The TTL ends at the node, at the gateway, at the server.
					far := 3
					if gateway == 2 {
						far = 2
					}
					for ttl := 1; ttl < far; ttl++ {
						out, _ := exec.Command("ip", "netns", "exec", pod.name, "ping", "-c1", "-W2", "-t", strconv.Itoa(ttl), f.server).CombinedOutput()
						if !strings.Contains(string(out), "exceeded") && !strings.Contains(string(out), "limit") {
							t.Errorf("a ping with %d hops to go: nothing is said:\n%s", ttl, out)
						}
					}
				})
			}
		})
	}
}

// A gateway sends with an egress IP for a node only what has a port of that node's block, and only with its permit.
func TestANodeSendsWithItsOwnPortsOnly(t *testing.T) {
	for _, f := range withFastPath() {
		t.Run(f.name(), func(t *testing.T) {
			b := newBlockSite(t, f)
			b.ext.serve(f.server)
			far := b.nodes[3].tables
			eventually(t, "the pod does not get out", func() bool { return b.pods["a"].seenAtOnce(f.server) != "" })
			if got := b.pods["a"].seen(f.server); got != f.egress {
				t.Fatalf("source %q, want the egress IP", got)
			}
			refuses := func(what, counter string) {
				t.Helper()
				counts(t, far, counter, func() {
					if got := b.pods["a"].seenAtOnce(f.server); got != "" {
						t.Errorf("%s: source %q, want nothing", what, got)
					}
				})
			}
			b.mangle = func(n int, s *State) {
				if n == 1 {
					s.Blocks = map[egress.ID]egress.Block{blockID: b.block(2)}
				}
			}
			b.reach()
			refuses("a port of another node's block", CounterSender)
			b.mangle = func(n int, s *State) {
				if n == 1 {
					s.Blocks = map[egress.ID]egress.Block{blockID: {IP: b.f.egressIP(), First: 1024, Size: 64}}
				}
			}
			b.reach()
			refuses("a port of no block", CounterSender)
			b.mangle = nil
			b.reach()
			if got := b.pods["a"].seen(f.server); got != f.egress {
				t.Fatalf("its own block again: source %q, want the egress IP", got)
			}
			// A mark that the sender gives its frames, as the group policy id, steers nothing here.
			b.nodes[1].run("nft add table netdev forge")
			b.nodes[1].run("nft add chain netdev forge out { type filter hook egress device egret.vx priority 10; }")
			b.nodes[1].run(fmt.Sprintf("nft add rule netdev forge out meta mark set 0x%x", uint32(egress.LocalMark)))
			refuses("a group policy id that is a routing mark", CounterSender)
			b.nodes[1].run("nft delete table netdev forge")
			b.mangle = func(n int, s *State) {
				if n == 3 {
					h := s.Hosted[blockID]
					h.Limit = Limit{Rate: 10, Burst: 10} // less than any packet
					s.Hosted[blockID] = h
				}
			}
			b.reach()
			refuses("more than the limit", CounterBandwidth)
			b.mangle = func(n int, s *State) {
				if n == 3 {
					s.Hosted, s.Ports, s.AddressGuard, s.NextHops, s.Gateways = nil, nil, nil, nil, nil
				}
			}
			b.reach()
			refuses("an egress IP that is not here", CounterUnhosted)
			b.mangle = nil
			b.reach()
			if got := b.pods["a"].seen(f.server); got != f.egress {
				t.Fatalf("as before: source %q, want the egress IP", got)
			}
			b.permitFast(3, 0)
			if err := far.Revoke(f.egressIP()); err != nil {
				t.Fatal(err)
			}
			refuses("no permit", CounterGuard)
		})
	}
}

// What a pod, or a host outside, sends to the egress IP without a connection ends where it comes in: no reset, no way
// to a pod.
func TestNobodyReachesAPodThroughItsBlock(t *testing.T) {
	for _, f := range withFastPath() {
		t.Run(f.name(), func(t *testing.T) {
			b := newBlockSite(t, f)
			b.ext.serve(f.server)
			eventually(t, "the pod does not get out", func() bool { return b.pods["a"].seenAtOnce(f.server) == f.egress })
			for n := 1; n <= 3; n++ {
				port := strconv.Itoa(int(b.block(n).First) + 7)
				for _, s := range []space{b.pods["a"], b.nodes[1].space, b.nodes[3].space} {
					s.serveAt(port, "::")
				}
				for name, from := range map[string]space{"a host outside": b.ext, "a pod": b.pods["c"]} {
					if got := answer(t, from.in(), f.egress, port); got != "" {
						t.Errorf("%s gets %q from port %s", name, got, port)
					}
					err := netns.Do(from.name, func() error {
						c, err := net.DialTimeout("tcp", net.JoinHostPort(f.egress, port), 300*time.Millisecond)
						if err == nil {
							c.Close()
						}
						return err
					})
					if err == nil || errors.Is(err, syscall.ECONNREFUSED) {
						t.Errorf("%s: a connection to port %s: %v, want that nobody answers", name, port, err)
					}
				}
			}
			if !b.ext.ok("ping -c1 -w3 " + f.egress) {
				t.Error("the egress IP answers no ping")
			}
		})
	}
}

// A node without a block is served by its gateway, with ports that are of no block.
func TestANodeWithoutABlockTakesNoPortOfOthers(t *testing.T) {
	for _, f := range blockSides() {
		t.Run(f.pod, func(t *testing.T) {
			b := newBlockSite(t, f)
			b.listenTCP(7001)
			b.without(1)
			b.reach()
			from := int(b.block(2).First) // what pod c may have outside
			for _, pod := range []string{"a", "b"} {
				_, seen := b.dial(pod, from, 7001)
				b.inNoBlock("pod "+pod, seen)
			}
			_, seen := b.dial("c", 0, 7001)
			b.inBlock("a pod of a node with a block", seen, 2)
		})
	}
}

// What has no ports, and no blocks, is translated by the gateway: both ways, whoever that is.
func TestProtocolsWithoutPortsLeaveWithTheEgressIP(t *testing.T) {
	for _, f := range blockSides() {
		t.Run(f.pod, func(t *testing.T) {
			b := newBlockSite(t, f)
			for name, gateway := range map[string]int{"another node is the gateway": 3, "its own node is the gateway": 2} {
				b.gates = gateway
				b.reach()
				for protocol, payload := range map[int][]byte{
					unix.IPPROTO_GRE: {0, 0, 8, 0, 'n', 'o', ' ', 'I', 'P'}, unix.IPPROTO_ESP: {0, 0, 0, 7, 0, 0, 0, 1, 'x'}, unix.IPPROTO_AH: {4, 1, 0, 0, 'x'}, 253: {'x'},
				} {
					t.Run(fmt.Sprintf("%d/%s", protocol, name), func(t *testing.T) {
						network := fmt.Sprintf("ip%s:%d", map[bool]string{true: "4", false: "6"}[f.egressIP().Is4()], protocol)
						listen := func(s space, ip string) (c net.PacketConn) {
							s.do(func() (err error) { c, err = net.ListenPacket(network, ip); return err })
							t.Cleanup(func() { c.Close() })
							return c
						}
						server, pod := listen(b.ext, f.server), listen(b.pods["c"], b.podAddress("c").String())
						hears := func(c net.PacketConn, from netip.Addr) {
							t.Helper()
							buf := make([]byte, 100)
							if err := c.SetReadDeadline(time.Now().Add(2 * time.Second)); err != nil {
								t.Fatal(err)
							}
							n, addr, err := c.ReadFrom(buf)
							if err != nil {
								t.Fatal(err)
							}
							if got := netip.MustParseAddr(addr.String()); got != from || string(buf[:n]) != string(payload) {
								t.Errorf("%q from %s, want %q from %s", buf[:n], got, payload, from)
							}
						}
						send := func(c net.PacketConn, to string) {
							t.Helper()
							if _, err := c.WriteTo(payload, &net.IPAddr{IP: net.ParseIP(to)}); err != nil {
								t.Fatal(err)
							}
						}
						send(pod, f.server)
						hears(server, f.egressIP())
						send(server, f.egress)
						hears(pod, netip.MustParseAddr(f.server))
					})
				}
				// as the agent does where the gateway is another
				b.output(b.nodes[2].space, "conntrack -D -d "+f.server)
			}
		})
	}
}

// One of the ports of a block may be the overlay's: that is one of nodes' addresses alone.
func TestAnswersToTheOverlaysPortOfABlockFindTheirPod(t *testing.T) {
	for _, f := range blockSides() {
		t.Run(f.pod, func(t *testing.T) {
			const port = int(egress.OverlayPort)
			b := newBlockSite(t, f)
			b.mangle = func(_ int, s *State) {
				first := func(node int) uint16 { return uint16(port&^63 + 64*(node-1)) }
				for id, block := range s.Blocks {
					block.First = first(1)
					s.Blocks[id] = block
				}
				for i, p := range s.Ports {
					s.Ports[i].First = first(p.Index)
				}
			}
			b.reach()
			b.ext.serve(f.server)
			eventually(t, "no answer", func() (answered bool) {
				b.pods["a"].do(func() error {
					c, err := (&net.Dialer{LocalAddr: &net.UDPAddr{Port: port}}).Dial("udp", net.JoinHostPort(f.server, "7000"))
					if err != nil {
						return err
					}
					defer c.Close()
					if err := c.SetDeadline(time.Now().Add(300 * time.Millisecond)); err != nil {
						return err
					}
					_, _ = c.Write([]byte("?")) // what is lost shows as no answer
					n, _ := c.Read(make([]byte, 100))
					answered = n > 0
					return nil
				})
				return answered
			})
		})
	}
}
