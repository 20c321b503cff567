package nft

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

// BenchmarkPacket is what a datagram of a pod costs that leaves through its node's gateway, with one pod and one egress
// on the node and with many. Beside it: a packet that no egress selects, and the obvious alternative, a rule per pod. A
// packet's way ends in the socket of the host outside, all of it in the sender's time.
func BenchmarkPacket(b *testing.B) {
	const many = 2000
	f := bothSides[0]
	selected := func(pods int) State {
		s := parseState(b, f.base()+"pod "+f.pod+" 5\nnexthop 5 0x3fff\nhosted 5 "+f.egress+" 0x3fff\n")
		pod, ip := netip.MustParseAddr("10.244.100.1"), netip.MustParseAddr("10.20.0.1")
		for i := range pods - 1 {
			id := egress.ID(i + 10)
			s.Pods[pod], s.NextHops[id], s.Hosted[id] = id, s.NextHops[5], Hosted{IP: ip, Mark: s.Hosted[5].Mark}
			s.AddressGuard = append(s.AddressGuard, ip)
			pod, ip = pod.Next(), ip.Next()
		}
		return s
	}
	plain := time.Duration(0)
	for _, tt := range []struct {
		name  string
		state State
		rules string
	}{
		{"unselected", parseState(b, f.base()), ""},
		{"pods=1", selected(1), ""},
		{fmt.Sprintf("pods=%d", many), selected(many), ""},
		{fmt.Sprintf("rules=%d", many), parseState(b, f.base()), "table ip rules { chain c { type filter hook prerouting priority -150; " + rulesThatMark(many) + " }; }"},
	} {
		b.Run(tt.name, func(b *testing.B) {
			tables := open(b)
			ext, p := outside(b), pod(b)
			ext.serve(f.server)
			f.addEgressIP(b)
			reach(b, tables, tt.state)
			if err := tables.Permit([]Permit{{f.egressIP(), true}}, time.Hour); err != nil {
				b.Fatal(err)
			}
			if tt.rules != "" {
				nft(b, tt.rules)
			}
			want := f.node
			if _, ok := tt.state.Pods[netip.MustParseAddr(f.pod)]; ok {
				want = f.egress
			}
			if got := p.seen(f.server); got != want {
				b.Fatalf("the pod leaves as %q, want %s", got, want)
			}
			send(b, ext, p, f.server)
			if one := b.Elapsed() / time.Duration(b.N); plain == 0 {
				plain = one
			} else {
				b.ReportMetric(float64(one)/float64(plain), "of-unselected")
			}
		})
	}
}

// rulesThatMark are rules for n pods, none of them the one that sends.
func rulesThatMark(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "ip saddr 10.244.%d.%d meta mark set 0x40000000; ", 100+i/250, i%250+1)
	}
	return b.String()
}

// BenchmarkOverlay is what a datagram costs from a pod by the overlay to the gateway, and out of it: two nodes and the
// host outside, all in the sender's time.
func BenchmarkOverlay(b *testing.B) {
	f := bothSides[0]
	tables := open(b)
	ext, p := outside(b), pod(b)
	ext.serve(f.server)
	here, there := netip.MustParseAddr("10.11.0.101"), netip.MustParseAddr("10.11.0.102")
	far := remoteGateway(b, ext, here, there).tables()
	reach(b, tables, parseState(b, fmt.Sprintf("self %s\nnode %s\n", here, there)+f.atPod(5, there)))
	reach(b, far, parseState(b, fmt.Sprintf("self %s\nnode %s\n", there, here)+f.atGateway(5, here)))
	if err := far.Permit([]Permit{{IP: f.egressIP()}}, time.Hour); err != nil {
		b.Fatal(err)
	}
	if got := p.seen(f.server); got != f.egress {
		b.Fatalf("the pod leaves as %q, want %s", got, f.egress)
	}
	send(b, ext, p, f.server)
}

// threadTime is the CPU time of the calling thread, ns.
func threadTime() int64 {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts) // it is there
	return ts.Nano()
}

// send sends datagrams from a pod to the host outside until the benchmark is over.
func send(b *testing.B, ext, p space, server string) {
	var sink net.PacketConn
	ext.do(func() (err error) { sink, err = net.ListenPacket("udp", net.JoinHostPort(server, "9")); return err })
	defer sink.Close()
	p.do(func() error {
		c, err := net.Dial("udp", net.JoinHostPort(server, "9"))
		if err != nil {
			return err
		}
		defer c.Close()
		packet := make([]byte, 100)
		begin := threadTime()
		for b.Loop() {
			if _, err := c.Write(packet); err != nil {
				return err
			}
		}
		b.ReportMetric(float64(threadTime()-begin)/float64(b.N), "cpu-ns/op") // whatever else runs
		return nil
	})
}
