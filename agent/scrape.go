package agent

import (
	"errors"
	"net/netip"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/fastpath"
	"github.com/egret-project/egret/gossip"
	"github.com/egret-project/egret/monitor"
	"github.com/egret-project/egret/nft"
)

// readMetrics puts what is read when it is asked for: from the kernel, and from what the parts of the agent know. It
// takes none of reconcile's time.
func (a *agent) readMetrics(put func(d monitor.Metric, value float64, labels ...string)) error {
	a.metrics.mu.Lock()
	degraded, owned := a.metrics.degraded, a.metrics.owned
	a.metrics.mu.Unlock()
	one := func(d monitor.Metric, label string) { put(d, 1, label) }
	for _, part := range degraded {
		one(metricDegraded, part)
	}
	for _, ip := range owned {
		one(metricOwned, ip.String())
	}
	watching := 0.0
	if a.view.Healthy() {
		watching = 1
	}
	put(metricWatch, watching)
	for ip := range a.conflicts() {
		one(metricConflict, ip.String())
	}
	for ip := range a.drops.why() {
		one(metricDropping, ip.String())
	}
	if a.gossip != nil {
		members := map[gossip.State]int{gossip.Alive: 0, gossip.Dead: 0, gossip.Left: 0, gossip.Unknown: 0}
		if s := a.view.Snapshot(); s != nil {
			for peer := range s.Agents {
				if peer != a.Node {
					members[a.gossip.State(peer)]++
				}
			}
		}
		for state, n := range members {
			put(metricGossip, float64(n), state.String())
		}
	}
	for ip, n := range a.ports.counts() {
		put(metricPorts, float64(n.block.Size), ip.String())
		put(metricPortsUsed, float64(n.most), ip.String())
	}
	ips := map[egress.ID]netip.Addr{}
	if s := a.view.Snapshot(); s != nil {
		for _, e := range s.Egresses {
			for _, addr := range e.Addresses {
				ips[addr.ID] = addr.IP
			}
		}
		for pool := range s.Agents[a.Node].Refused {
			one(metricRefused, pool)
		}
	}
	for id, n := range a.open.counts() {
		if ip, known := ips[id]; known { // else the egress is gone
			put(metricOpen, float64(n), ip.String())
		}
	}
	return readKernel(a.tables, a.fast, ips, put)
}

// readKernel puts what the tables have counted, and the fast path.
func readKernel(tables *nft.Tables, fast *fastpath.Path, ips map[egress.ID]netip.Addr, put func(d monitor.Metric, value float64, labels ...string)) error {
	passed, err1 := traffic(tables, fast)
	for ip, n := range passed {
		label := ip.String()
		put(metricSentPackets, float64(n.SentPackets), label)
		put(metricSentBytes, float64(n.SentBytes), label)
		put(metricReceivedPackets, float64(n.ReceivedPackets), label)
		put(metricReceivedBytes, float64(n.ReceivedBytes), label)
	}
	opened, err2 := tables.Opened()
	for id, n := range opened {
		if ip, known := ips[id]; known { // else the egress is gone
			put(metricOpened, float64(n), ip.String())
		}
	}
	dropped, err3 := tables.Counters()
	for reason, n := range dropped {
		put(metricDropped, float64(n), reason)
	}
	steps, err4 := fast.Steps()
	for step, n := range map[string]uint64{"forwarded": steps.Forwarded, "wrapped": steps.Wrapped, "unwrapped": steps.Unwrapped, "failed": steps.Failed} {
		if fast != nil {
			put(metricFast, float64(n), step)
		}
	}
	return errors.Join(err1, err2, err3, err4)
}
