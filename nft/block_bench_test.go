package nft

import (
	"fmt"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/fastpath"
)

// BenchmarkBlock is what a datagram of a pod costs until it is in the socket of the host outside, all of it in the
// sender's time: masqueraded by the CNI without anything of ours, the same with four chains at our hooks of which each
// has one rule that does nothing, of a pod that no egress selects, with its own node as the gateway, with another one,
// and so with the fast path at that and at both; and, beside the last, by a plain VXLAN link to a node that
// masquerades. Rounds take turns: compare what one run says.
func BenchmarkBlock(b *testing.B) {
	f := bothSides[0]
	without := func(s *blockSite) {
		for _, n := range s.nodes {
			if err := n.tables.Delete(); err != nil {
				b.Fatal(err)
			}
			n.do(n.router.Delete)
		}
	}
	for round := range 3 {
		for _, tt := range []struct {
			name  string
			gates int
			make  func(*blockSite)
		}{
			{"masquerade", 3, without},
			{"chains", 3, func(s *blockSite) {
				without(s)
				s.nodes[2].run("nft add table inet chains")
				for i, hook := range []string{"prerouting priority -310", "prerouting priority -90", "postrouting priority 0", "postrouting priority 300"} {
					s.nodes[2].run(fmt.Sprintf("nft add chain inet chains c%d { type filter hook %s; }", i, hook))
					s.nodes[2].run(fmt.Sprintf("nft add rule inet chains c%d iifname nobody drop", i))
				}
			}},
			{"unselected", 3, func(s *blockSite) {
				s.mangle = func(n int, state *State) { state.Unselected, state.Pods = []netip.Addr{s.podAddress("c")}, nil }
				s.reach()
			}},
			{"own", 2, func(*blockSite) {}},
			{"remote", 3, func(*blockSite) {}},
			{"fast gateway", 3, func(s *blockSite) {
				s.hasten()
				s.fast = map[int]*fastpath.Path{3: s.fast[3]}
				s.reach()
			}},
			{"fast", 3, func(s *blockSite) {
				s.hasten()
				s.reach()
			}},
			{"vxlan", 3, func(s *blockSite) {
				for _, n := range s.nodes {
					if err := n.tables.Delete(); err != nil {
						b.Fatal(err)
					}
				}
				neighbour := func(n int) string {
					return fmt.Sprintf("ip neigh add %s lladdr %s dev egret.vx nud permanent\n", s.underlay(n), egress.OverlayMAC(s.underlay(n)))
				}
				s.nodes[2].run(neighbour(3) + `ip route add 203.0.113.10/32 via 10.10.0.103 dev egret.vx onlink`)
				s.nodes[3].run(neighbour(2) + `ip route add 10.244.2.0/24 via 10.10.0.102 dev egret.vx onlink
					nft add table inet cni
					nft add chain inet cni post { type nat hook postrouting priority 100; }
					nft add rule inet cni post ip saddr 10.244.0.0/16 oifname eth0 masquerade
					sysctl -qw net.ipv4.conf.egret/vx.rp_filter=2`)
				s.nodes[2].run("nft flush table inet cni")
			}},
		} {
			b.Run(fmt.Sprintf("%s/%d", tt.name, round), func(b *testing.B) {
				s := newBlockSite(b, f)
				s.gates = tt.gates
				s.reach()
				tt.make(s)
				s.ext.serve(f.server)
				eventually(b, "the pod does not get out", func() bool { return s.pods["c"].seenAtOnce(f.server) != "" })
				b.Run("datagram", func(b *testing.B) { send(b, s.ext, s.pods["c"], f.server) })
				b.Run("KB", func(b *testing.B) { stream(b, s.ext, s.pods["c"], f.server) })
			})
		}
	}
}

// stream sends by TCP from a pod to the host outside until the benchmark is over, both ends in one thread.
func stream(b *testing.B, ext, p space, server string) {
	at := &unix.SockaddrInet4{Port: 7011, Addr: netip.MustParseAddr(server).As4()}
	open := func(s space) (fd int) {
		s.do(func() (err error) {
			fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			return err
		})
		b.Cleanup(func() { unix.Close(fd) })
		return fd
	}
	check := func(err error) {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
	}
	listening, from := open(ext), open(p)
	check(unix.SetsockoptInt(listening, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
	check(unix.Bind(listening, at))
	check(unix.Listen(listening, 1))
	check(unix.Connect(from, at))
	to, _, err := unix.Accept(listening)
	check(err)
	defer unix.Close(to)
	check(unix.SetNonblock(from, true))
	check(unix.SetNonblock(to, true))
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	buf, read, end := make([]byte, 1<<18), make([]byte, 1<<18), time.Time{}
	begin, total := threadTime(), 0
	for b.Loop() {
		for got := 0; got < 1<<10; {
			if _, err := unix.Write(from, buf); err != nil && err != unix.EAGAIN {
				b.Fatal(err)
			}
			n, err := unix.Read(to, read)
			if err != nil && err != unix.EAGAIN {
				b.Fatal(err)
			}
			if n > 0 {
				got, end = got+n, time.Time{}
				total += n
			} else if end.IsZero() {
				end = time.Now().Add(10 * time.Second)
			} else if time.Now().After(end) {
				b.Fatal("nothing for 10 s")
			}
		}
	}
	b.ReportMetric(float64(threadTime()-begin)*1024/float64(total), "cpu-ns/KB")
}
