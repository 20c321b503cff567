package integration

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/egret-project/egret/integration/lab"
)

// Somebody flushes all nftables and loads the CNI's again, as `systemctl restart nftables` does, while a pod on the
// gateway and one elsewhere open connections as fast as they can. The witness of the suite looks at the packets of
// these pods, too; here all that came is counted.
func TestNoPacketLeavesWithAnotherSourceWhileTheRulesetIsFlushed(t *testing.T) {
	n := newNamespace(t)
	ip, gateway, remote := n.remote("flushed", "10.10.0.19")
	local := n.pod("local", gateway, "web")
	selected(t, local, ip)
	restored := t.TempDir() + "/nftables.conf"
	outside, err := cluster.Sniff(t.Context(), "outside")
	if err != nil {
		t.Fatal(err)
	}
	nodes := []string{gateway, otherNode(gateway)}
	out, err := cluster.Exec(t.Context(), "node", gateway, "nft", "list", "table", "inet", "cni")
	if err == nil {
		err = os.WriteFile(restored, append([]byte("flush ruleset\n"), out...), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	var floods sync.WaitGroup
	for _, pod := range []string{local, remote} {
		floods.Go(func() { n.flood(ctx, pod) })
	}
	for i := range 50 {
		for _, node := range nodes {
			line := "nft -f " + restored
			if i%2 == 1 {
				line = "nft delete table inet egret; true" // refused, where the table has an owner
			}
			if out, err := cluster.Exec(t.Context(), "node", node, "sh", "-c", line); err != nil {
				t.Errorf("%s: %v\n%s", line, err, out)
			}
		}
		time.Sleep(20 * time.Millisecond)
	}
	stop()
	floods.Wait()
	if err := outside.Stop(); err != nil {
		t.Fatal(err)
	}
	sources := map[netip.Addr]int{}
	for _, p := range outside.Packets() {
		if p.DstPort == floodPort {
			sources[p.Src]++
		}
	}
	if len(sources) != 1 || sources[ip] < 1000 {
		t.Errorf("seen outside, by source: %v, want only %s, 1000 times and more", sources, ip)
	}
	for _, pod := range []string{local, remote} {
		leavesAs(t, pod, ip)
	}
}

// floodPort is nobody's.
const floodPort = 7999

// flood sends datagrams from a pod to outside until ctx ends, each from a socket of its own, so that each is a new
// connection, and one every time by a connection that stays. It begins connections of TCP, too.
func (n *namespace) flood(ctx context.Context, pod string) {
	to := netip.AddrPortFrom(lab.OutsideIP, floodPort).String()
	err := cluster.In("pod", pod, func() error {
		stays, err := net.Dial("udp", to)
		if err != nil {
			return err
		}
		defer stays.Close()
		for i := 0; ctx.Err() == nil; i++ {
			c, err := net.Dial("udp", to)
			if err != nil {
				return err
			}
			_, _ = c.Write([]byte("new"))       // errors tell of former answers, of which there are none
			_, _ = stays.Write([]byte("stays")) // as above
			c.Close()
			if i%50 == 0 {
				if c, err := net.DialTimeout("tcp", to, time.Millisecond); err == nil {
					c.Close()
				}
			}
		}
		return nil
	})
	if err != nil {
		n.t.Error(fmt.Errorf("flooding from %s: %w", pod, err))
	}
}
