package integration

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/egret-project/egret/agent"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/integration/lab"
	"github.com/egret-project/egret/internal/need"
)

// programs returns how many programs of eBPF there are at the uplink of a node and at its overlay link.
func programs(t *testing.T, node string) (uplink, overlay int) {
	t.Helper()
	at := func(name string) (n int, err error) {
		l, err := net.InterfaceByName(name)
		if err != nil {
			return 0, err
		}
		for _, way := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
			r, err := link.QueryPrograms(link.QueryOptions{Target: l.Index, Attach: way})
			if err != nil {
				return 0, err
			}
			n += len(r.Programs)
		}
		return n, nil
	}
	err := cluster.In("node", node, func() (err error) {
		if uplink, err = at("eth0"); err == nil {
			overlay, err = at(egress.OverlayLink)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return uplink, overlay
}

// All agents have --fast-path, for as long as the test. Connections that are open live through a planned move, a
// power-off, and agents that are killed and come back without it; meanwhile the gateway's programs take their packets,
// which count as the tables' do. Nobody's pod is in it that is not selected, and no pod gets in.
func TestConnectionsLiveByTheFastPath(t *testing.T) {
	need.TCX(t)
	n := newNamespace(t)
	ip, gateway, pod := n.remote("fast", "10.10.0.90")
	home := otherNode(gateway)
	next := otherNode(gateway, home)
	other := n.pod("other", home, "db")
	renewAfter(t)
	for _, node := range nodes() {
		if err := cluster.Upgrade(t.Context(), node, cluster.EgretPath(), "--fast-path"); err != nil {
			t.Fatal(err)
		}
	}
	for _, node := range nodes() {
		inService(t, node, false)
		hasRights(t, node, lab.AgentCapabilities, lab.FastPathCapabilities)
		eventually(t, 10*time.Second, func() error {
			if uplink, overlay := programs(t, node); uplink != 1 || overlay != 2 {
				return fmt.Errorf("%s has %d programs at its uplink and %d at the overlay link, want 1 and 2", node, uplink, overlay)
			}
			return nil
		})
	}
	talk, err := cluster.Converse(t.Context(), pod, lab.OutsideIP)
	if err != nil {
		t.Fatal(err)
	}
	defer talk.Close()
	listen, err := cluster.Converse(t.Context(), pod, lab.OutsideIP)
	if err != nil {
		t.Fatal(err)
	}
	defer listen.Close()
	pushed := listen.Push(20 * time.Millisecond)
	alive := func(when string) {
		t.Helper()
		if err := talk.Exchange(8 * time.Second); err != nil {
			t.Errorf("%s: %v", when, err)
		}
	}

	// What the programs forward is of what the gateway sends and receives, all of it.
	grown := func(before, after map[string]page, node, name string, labels ...string) float64 {
		m := metric(t, agent.Metrics(), name)
		a, _ := after[node].value(m, labels...)
		b, _ := before[node].value(m, labels...)
		return a - b
	}
	before := agents(t)
	r := probe(t, pod, time.Second, func() { alive("at the start") })
	only(t, r, ip)
	lossless(t, "by the fast path", r)
	after := agents(t)
	least := 0.9 * float64(r.Sent-r.Lost) // the first ones go by the tables, which find the neighbours
	for node, steps := range map[string][]string{gateway: {"forwarded", "wrapped"}, home: {"wrapped", "unwrapped"}, next: nil} {
		for _, step := range steps {
			if got := grown(before, after, node, "egret_fast_path_packets_total", "step="+step); got < least {
				t.Errorf("%s: the programs have %s %v packets, want %v of %d", node, step, got, least, r.Sent)
			}
		}
		if got := grown(before, after, node, "egret_fast_path_packets_total", "step=failed"); got != 0 {
			t.Errorf("%s: the programs dropped %v packets", node, got)
		}
	}
	for _, name := range []string{"egret_egress_sent_packets_total", "egret_egress_received_packets_total"} {
		if got := grown(before, after, gateway, name, "egress_ip="+ip.String()); got < float64(r.Sent-r.Lost) {
			t.Errorf("%s of the gateway grew by %v, want %d at least", name, got, r.Sent-r.Lost)
		}
	}

	// A pod that no egress selects leaves as ever, and not with the egress IP, whatever it writes.
	leavesAs(t, other, nodeIP(t, home))
	const port = 7002
	c := listenOutside(t, port)
	frame := vxlan(nodeIP(t, home), nodeIP(t, gateway), idOf(t, "fast"), udp4(netip.AddrPortFrom(ip, blockOf(t, ip, home).First), netip.AddrPortFrom(lab.OutsideIP, port), "forged"))
	near := n.pod("near", gateway, "db")
	for _, header := range [][]byte{frame[:4:4], {0x08, 0, 0, 0}} { // with an id, and without
		copy(frame, header)
		what := fmt.Sprintf("by the fast path, as %x", header)
		forge(t, c, [2]string{"pod", other}, home, gateway, frame, what)
		forge(t, c, [2]string{"pod", near}, gateway, gateway, frame, what)
		sendsAs(t, c, home, gateway, frame, ip)
	}

	r = probe(t, pod, 1500*time.Millisecond, func() {
		// on a machine that stood still, the agent may just be thought to be down
		eventually(t, 10*time.Second, func() error {
			_, err := cluster.Egret(t.Context(), "move", ip.String(), "--to", next)
			return err
		})
	})
	only(t, r, ip)
	lossless(t, "a planned move", r)
	alive("after a planned move")

	r = probe(t, pod, 3*time.Second, func() {
		if err := cluster.Crash(t.Context(), next); err != nil {
			t.Fatal(err)
		}
	})
	t.Cleanup(func() {
		if err := cluster.Recover(context.Background(), next); err != nil {
			t.Errorf("recovering %s: %v", next, err)
		}
	})
	only(t, r, ip)
	alive("after a power-off")
	_, heir := held(t, "fast")
	t.Logf("power-off of %s, %s after it: longest gap %v", next, heir, r.LongestGap)

	// Killed, an agent leaves no program, and its next one makes none without the flag: the tables have it all.
	for _, node := range []string{gateway, home} {
		if err := cluster.Kill(t.Context(), "agent", node); err != nil {
			t.Fatal(err)
		}
		eventually(t, 5*time.Second, func() error {
			if uplink, overlay := programs(t, node); uplink+overlay != 0 {
				return fmt.Errorf("%s has %d programs at its uplink and %d at the overlay link without an agent", node, uplink, overlay)
			}
			return nil
		})
		if err := cluster.Start(t.Context(), "agent", node); err != nil {
			t.Fatal(err)
		}
		inService(t, node, false)
		hasRights(t, node, lab.AgentCapabilities)
		if uplink, overlay := programs(t, node); uplink+overlay != 0 {
			t.Errorf("%s has programs without the flag: %d at its uplink and %d at the overlay link", node, uplink, overlay)
		}
	}
	leavesAs(t, pod, ip)
	alive("without the fast path")
	if err := pushed(10 * time.Second); err != nil {
		t.Error(err)
	}
	if err := watch.Doubles(); err != nil {
		t.Error(err)
	}
}
