package nft

import (
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/netns"
)

// A pod sends from more addresses of the node's pods than the tables remember. Over IPv6 no right is needed for that
// (IPV6_FREEBIND). Who is not known yet is delayed all the same; and what the tables remember of the flood keeps the
// agent from nothing.
func TestAFloodOfSourcesEndsNoDelayOfOthers(t *testing.T) {
	for i, f := range blockSides() {
		t.Run(f.pod, func(t *testing.T) {
			tables := open(t)
			ext, p := outside(t), pod(t)
			ext.serve(f.server)
			f.addEgressIP(t)
			base := f.base() + fmt.Sprintf("podcidr %s\nhosted 5 %s 0x3fff\nnexthop 5 0x3fff\ndelay 10m\n", f.pods, f.egress)
			with := func(lines string) {
				t.Helper()
				reach(t, tables, parseState(t, base+lines))
				if err := tables.Permit([]Permit{{f.egressIP(), true}}, time.Hour); err != nil {
					t.Fatal(err)
				}
			}
			with("")
			netns.Run(t, "ip route add 10.244.0.0/16 dev cni0") // as a bridge has it
			size := func(set string) int {
				t.Helper()
				list, err := tables.dumpSet(table{family: nftables.TableFamilyINet, name: egress.TableName}, set+f.digit())
				if err != nil {
					t.Fatal(err)
				}
				return len(list)
			}
			next := netip.MustParseAddr([]string{"10.244.64.0", "fd44:1::1:0"}[i])
			for range 2 { // the kernel may drop some
				next = f.flood(t, p, next, maxPods)
			}
			if held, seen := size("held"), size("seen"); held < maxPods || seen < maxPods {
				t.Fatalf("a flood leaves %d and %d sources in the sets", held, seen)
			}
			counts(t, tables, CounterUnknown, func() {
				if got := p.seenAtOnce(f.server); got != "" {
					t.Errorf("a pod that is not known yet is not delayed: it leaves as %s", got)
				}
			})
			with("pod " + f.pod + " 5\n")
			if got := p.seen(f.server); got != f.egress {
				t.Errorf("once it is selected it leaves as %q, want %s", got, f.egress)
			}
			with("known " + f.pod + "\n")
			if got := p.seen(f.server); got != f.node {
				t.Errorf("once it is known not to be selected it leaves as %q, want %s", got, f.node)
			}
		})
	}
}

// A pod sends with the address that another one of its bridge is about to get, and has the delay behind it. The other
// one is delayed.
func TestNobodyHasTheDelayOfAnotherBehindHim(t *testing.T) {
	const delay = 500 * time.Millisecond
	for i, f := range bothSides {
		t.Run(f.pod, func(t *testing.T) {
			tables := open(t)
			ext := outside(t)
			ext.serve(f.server)
			f.addEgressIP(t)
			netns.RunAll(t, "", `ip link add cni0 type bridge
				ip link set cni0 up
				ip addr add 10.244.1.1/24 dev cni0
				ip addr add fd44:1::1/64 dev cni0 nodad`)
			nft(t, cni)
			onBridge := func(name, number string) space {
				p := newSpace(t, name)
				netns.RunAll(t, "", fmt.Sprintf("ip link add %s type veth peer name eth0 netns %s\nip link set %[1]s master cni0 up", name, p.name))
				p.run(`ip link set eth0 up
					ip addr add 10.244.1.` + number + `/24 dev eth0
					ip addr add fd44:1::` + number + `/64 dev eth0 nodad
					ip route add default via 10.244.1.1
					ip -6 route add default via fd44:1::1`)
				return p
			}
			first := onBridge("first", "3")
			own := []string{"10.244.1.3", "fd44:1::3"}[i]
			reach(t, tables, parseState(t, f.base()+fmt.Sprintf("podcidr %s\nknown %s\ndelay %v\n", f.pods, own, delay)))
			var sink net.PacketConn
			ext.do(func() (err error) {
				sink, err = net.ListenPacket("udp", net.JoinHostPort(f.server, "7002"))
				return err
			})
			defer sink.Close()
			eventually(t, "what is sent with the address does not leave after the delay either", func() bool {
				first.do(func() error {
					return raw(netip.MustParseAddr(f.pod), netip.MustParseAddr(f.server), 7002, []byte("early"))
				})
				if err := sink.SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
					t.Fatal(err)
				}
				_, _, err := sink.ReadFrom(make([]byte, 100))
				return err == nil
			})
			second := onBridge("second", "2")
			if !second.ok("ping -c1 -w5 " + f.gateway) {
				t.Error("the second pod does not reach its node")
			}
			counts(t, tables, CounterUnknown, func() {
				if got := second.seenAtOnce(f.server); got != "" {
					t.Errorf("a pod that is not known yet is not delayed, since another one has used its address: it leaves as %s", got)
				}
			})
			eventually(t, "it is delayed for good", func() bool { return second.seenAtOnce(f.server) == f.node })
		})
	}
}

// A pod sends from an address that no pod has, where each has a link of its own. It does not leave, also when the delay
// is over.
func TestNobodySendsWithTheAddressOfNoPod(t *testing.T) {
	for i, f := range bothSides {
		t.Run(f.pod, func(t *testing.T) {
			tables := open(t)
			ext, p := outside(t), pod(t)
			netns.Run(t, "sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.cni0.rp_filter=0")
			reach(t, tables, parseState(t, f.base()+"podcidr "+f.pods+"\ndelay 10ms\npod "+f.pod+" 5\n"))
			nobody := netip.MustParseAddr([]string{"10.244.7.7", "fd44:7::7"}[i])
			if !p.ok("ping -c1 -w5 " + f.gateway) {
				t.Fatal("the pod does not reach its node")
			}
			for range 3 {
				counts(t, tables, CounterForged, func() {
					sneaks(t, "a selected pod with the address of none", ext, f, func() {
						p.do(func() error { return raw(nobody, netip.MustParseAddr(f.server), 7002, []byte("forged")) })
					})
				})
			}
		})
	}
}

// digit is the last letter of the names of the family's sets.
func (f sides) digit() string {
	if f.egressIP().Is4() {
		return ipv4.digit
	}
	return ipv6.digit
}

// flood has a pod send a datagram to the server from each of n addresses, and returns the one after them.
func (f sides) flood(t *testing.T, p space, from netip.Addr, n int) netip.Addr {
	t.Helper()
	server := netip.AddrPortFrom(netip.MustParseAddr(f.server), 9)
	p.do(func() error {
		family, to := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{Addr: server.Addr().As16()})
		if from.Is4() {
			family, to = unix.AF_INET, &unix.SockaddrInet4{Addr: server.Addr().As4()}
		}
		fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		for range n {
			if err := unix.Sendto(fd, datagram(netip.AddrPortFrom(from, 7003), server, nil), 0, to); err != nil {
				return err
			}
			from = from.Next()
		}
		return nil
	})
	return from
}
