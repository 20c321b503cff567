package nft

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// exchange sends datagrams from a pod to the server, which answers each with as much, and returns how many answers
// came.
func (b *blockSite) exchange(pod string, count, size int) (answers int) {
	b.t.Helper()
	b.pods[pod].do(func() error {
		c, err := net.Dial("udp", net.JoinHostPort(b.f.server, "7009"))
		if err != nil {
			return err
		}
		defer c.Close()
		for range count {
			if _, err := c.Write(make([]byte, size)); err != nil {
				return err
			}
			if err := c.SetReadDeadline(time.Now().Add(300 * time.Millisecond)); err != nil {
				return err
			}
			if n, _ := c.Read(make([]byte, 2000)); n == size {
				answers++
			}
		}
		return nil
	})
	return answers
}

func TestTrafficIsWhatPassedByAnEgressIP(t *testing.T) {
	for _, f := range blockSides() {
		t.Run(f.pod, func(t *testing.T) {
			b := newBlockSite(t, f)
			var echo net.PacketConn
			b.ext.do(func() (err error) {
				echo, err = net.ListenPacket("udp", net.JoinHostPort(f.server, "7009"))
				return err
			})
			defer echo.Close()
			go func() {
				for buf := make([]byte, 2000); ; {
					n, from, err := echo.ReadFrom(buf)
					if err != nil {
						return
					}
					_, _ = echo.WriteTo(buf[:n], from) // lost, it is missed
				}
			}()
			header := 28
			if f.egressIP().Is6() {
				header = 48
			}
			ip := f.egressIP()
			check := func(what string, node int, want Traffic) {
				t.Helper()
				got, err := b.nodes[node].tables.Traffic()
				if err != nil {
					t.Fatal(err)
				}
				all := map[netip.Addr]Traffic{ip: want}
				if want == (Traffic{}) && node == 1 { // it may not send with the IP
					all = map[netip.Addr]Traffic{}
				}
				if diff := cmp.Diff(all, got); diff != "" {
					t.Errorf("%s, node %d (-want +got):\n%s", what, node, diff)
				}
			}
			passed := func(packets, size int) Traffic {
				p, n := uint64(packets), uint64(packets*(size+header))
				return Traffic{p, n, p, n}
			}
			if n := b.exchange("a", 20, 100); n != 20 {
				t.Fatalf("%d of 20 answers", n)
			}
			for node, want := range map[int]Traffic{1: {}, 2: {}, 3: passed(20, 100)} {
				check("a pod of another node", node, want)
			}

			b.gates = 2
			b.reach()
			if n := b.exchange("c", 10, 1000); n != 10 {
				t.Fatalf("%d of 10 answers", n)
			}
			for node, want := range map[int]Traffic{1: {}, 2: passed(10, 1000), 3: passed(20, 100)} {
				check("a pod of the gateway's own node", node, want)
			}

			// What has no block is translated at the gateway, and counts there alike.
			b.without(1)
			b.reach()
			if n := b.exchange("b", 5, 500); n != 5 {
				t.Fatalf("%d of 5 answers", n)
			}
			with := func(a, b Traffic) Traffic {
				return Traffic{a.SentPackets + b.SentPackets, a.SentBytes + b.SentBytes, a.ReceivedPackets + b.ReceivedPackets, a.ReceivedBytes + b.ReceivedBytes}
			}
			all := with(passed(10, 1000), passed(5, 500))
			check("a pod without a block", 2, all)

			// What does not leave is not sent; what comes and is dropped has come.
			if err := b.nodes[2].tables.Revoke(ip); err != nil {
				t.Fatal(err)
			}
			if n := b.exchange("c", 3, 10) + b.exchange("a", 3, 10); n != 0 {
				t.Errorf("%d answers without a permit", n)
			}
			check("without a permit", 2, all)
			b.ext.do(func() error {
				c, err := net.Dial("udp", net.JoinHostPort(ip.String(), "22"))
				if err != nil {
					return err
				}
				defer c.Close()
				_, err = c.Write(make([]byte, 40))
				return err
			})
			all.ReceivedPackets++
			all.ReceivedBytes += uint64(40 + header)
			for until := time.Now().Add(2 * time.Second); time.Now().Before(until); time.Sleep(10 * time.Millisecond) {
				if got, err := b.nodes[2].tables.Traffic(); err == nil && got[ip] == all {
					break
				}
			}
			check("a knock from outside", 2, all)

			// A look, and an Apply of what is there, change no count.
			b.mangle = nil
			b.without(1)
			b.reach()
			check("after an Apply", 2, all)
			if err := b.nodes[2].tables.Delete(); err != nil {
				t.Fatal(err)
			}
			if got, err := b.nodes[2].tables.Traffic(); err != nil || len(got) != 0 {
				t.Errorf("without tables: %v, %v", got, err)
			}
		})
	}
}

// An upgrade finds sets that do not count: they are made anew, and nothing else is lost.
func TestSetsThatDoNotCountAreMadeAnew(t *testing.T) {
	s := set{name: "hostedip4", key: address4, size: maxHosted, counted: true}
	old := observedTable{sets: map[string]observedSet{"hostedip4": {key: address4.GetNFTMagic(), keyLen: 4, size: maxHosted}}}
	if s.fault(old) == "" {
		t.Error("a set without counters passes for one with them")
	}
}
