package scale

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/egret-project/egret/integration/cdf"
)

// rest measures while nothing changes.
func (b *bench) rest(ctx context.Context) error {
	if !sleep(ctx, 5*time.Second) {
		return context.Cause(ctx)
	}
	r, err := b.during(ctx, func(ctx context.Context) error { sleep(ctx, b.Rest); return ctx.Err() })
	if err != nil {
		return err
	}
	a, err := b.ask(request{Do: "count"})
	if err != nil {
		return err
	}
	b.r.add(leasesLost, float64(a.Lost))
	b.r.add(unanswered, float64(a.Unheard))
	b.r.add(restReads, r.reads)
	b.r.add(restWrites, r.writes)
	b.r.add(restRenewals, r.renewals)
	b.r.add(restEvents, r.events)
	b.r.add(restEtcdCPU, 100*r.cpu["etcd"])
	b.r.add(restCrdsyncCPU, 100*r.cpu["crdsync"])
	b.r.add(restAgentCPU, 100*r.cpu["agent"])
	b.r.add(restFleetCPU, 100*r.cpu["fleet"])
	return b.memories(restEtcdMB, restCrdsyncMB, restAgentMB)
}

func (b *bench) during(ctx context.Context, do func(context.Context) error) (rates, error) {
	begin, err := b.take(ctx)
	if err != nil {
		return rates{}, err
	}
	if err := do(ctx); err != nil {
		return rates{}, err
	}
	end, err := b.take(ctx)
	return end.since(begin), err
}

// memories adds the resident memory of etcd, crdsync and the agent.
func (b *bench) memories(rows ...row) error {
	for i, name := range []string{"etcd", "crdsync", "agent"} {
		now, _, err := memory(b.pids[name])
		if err != nil {
			return err
		}
		b.r.add(rows[i], now)
	}
	return nil
}

// change changes the labels of pods, one after the other, so that they are another egress's. Of pods of node 1 it
// measures how long it takes until the kernel has it.
func (b *bench) change(ctx context.Context) error {
	before, err := b.ask(request{Do: "count"})
	if err != nil {
		return err
	}
	var whole, rest []time.Duration
	missed := 0
	r, err := b.during(ctx, func(ctx context.Context) error {
		tick := time.NewTicker(time.Second / time.Duration(b.Events))
		defer tick.Stop()
		for i := range int(b.Rest.Seconds()) * b.Events {
			select {
			case <-ctx.Done():
				return context.Cause(ctx)
			case <-tick.C:
			}
			local, turn := i%4 == 0, i/4
			pod := b.Cluster.podOf(1, turn)
			if !local {
				pod = b.Cluster.podOf(2+i%(b.Cluster.Nodes-1), i)
			}
			app := b.other(pod, i)
			if !local {
				if err := b.relabel(ctx, pod, app); err != nil {
					return err
				}
				continue
			}
			sent, answered, done, err := b.toKernel(ctx, pod, app)
			if err != nil {
				return err
			}
			if done.IsZero() {
				missed++
				continue
			}
			whole, rest = append(whole, done.Sub(sent)), append(rest, max(0, done.Sub(answered)))
		}
		return nil
	})
	if err != nil {
		return err
	}
	after, err := b.ask(request{Do: "count"})
	if err != nil {
		return err
	}
	b.r.add(busyReads, r.reads)
	b.r.add(busyWrites, r.writes)
	b.r.add(busyEvents, r.events)
	b.r.add(busySeen, float64(after.Events-before.Events)/r.seconds)
	b.r.add(busyPods, float64(int(b.Rest.Seconds())*b.Events)/r.seconds)
	b.r.add(busyEtcdCPU, 100*r.cpu["etcd"])
	b.r.add(busyCrdsyncCPU, 100*r.cpu["crdsync"])
	b.r.add(busyFleetCPU, 100*r.cpu["fleet"])
	b.r.add(busyAgentCPU, 100*r.cpu["agent"])
	ms := func(all []time.Duration, q float64) float64 { return cdf.Milliseconds(cdf.Quantile(all, q)) }
	b.r.add(kernelP50, ms(rest, 0.5))
	b.r.add(kernelP99, ms(rest, 0.99))
	b.r.add(wholeP50, ms(whole, 0.5))
	b.r.add(wholeP99, ms(whole, 0.99))
	b.r.add(kernelMissed, float64(missed))
	if err := b.memories(busyEtcdMB, busyCrdsyncMB, busyAgentMB); err != nil {
		return err
	}
	_, most, err := memory(b.pids["crdsync"])
	b.r.add(crdsyncMost, most)
	return err
}

// toKernel gives a pod of node 1 another app, and waits until the node's kernel has that; done is zero after 2 s.
func (b *bench) toKernel(ctx context.Context, pod, app int) (sent, answered, done time.Time, err error) {
	ip := b.Cluster.podIPs(pod)[0]
	was, err := b.node1.pods()
	if err != nil {
		return
	}
	sent = time.Now()
	if err = b.relabel(ctx, pod, app); err != nil {
		return
	}
	answered = time.Now()
	for time.Since(answered) < 2*time.Second {
		var is map[netip.Addr]string
		if is, err = b.node1.pods(); err != nil {
			return
		}
		if is[ip] != was[ip] {
			done = time.Now()
			return
		}
		sleep(ctx, 2*time.Millisecond)
	}
	return
}

func (b *bench) relabel(ctx context.Context, pod, app int) error {
	patch := fmt.Appendf(nil, `{"metadata": {"labels": {"app": "%d"}}}`, app)
	b.apps[pod] = app
	_, err := b.core.CoreV1().Pods(b.Cluster.namespace(pod)).Patch(ctx, b.Cluster.pod(pod), types.MergePatchType, patch, metav1.PatchOptions{})
	return err
}

// takeOver powers node 2 off, and waits until node 1 has permits for all its IPs.
func (b *bench) takeOver(ctx context.Context) error {
	before, err := b.node1.permitted()
	if err != nil {
		return err
	}
	type answer struct {
		reply
		err error
	}
	done := make(chan answer, 1)
	told, err := b.ask(request{Do: "count"})
	if err != nil {
		return err
	}
	begin, err := b.take(ctx)
	if err != nil {
		return err
	}
	began := time.Now()
	go func() {
		a, err := b.ask(request{Do: "die"})
		done <- answer{a, err}
	}()
	var first, last time.Duration
	n := before
	for n < before+b.Cluster.TakeOver {
		if time.Since(began) > 30*time.Second {
			break
		}
		if n, err = b.node1.permitted(); err != nil {
			return err
		}
		if n > before && first == 0 {
			first = time.Since(began)
		}
		last = time.Since(began)
		if !sleep(ctx, 5*time.Millisecond) {
			return context.Cause(ctx)
		}
	}
	a := <-done
	if a.err != nil {
		return a.err
	}
	end, err := b.take(ctx)
	if err != nil {
		return err
	}
	r := end.since(begin)
	seen, err := b.settled(ctx)
	if err != nil {
		return err
	}
	b.r.add(takeSeen, float64(seen-told.Events))
	b.r.add(takeEtcdCPU, 100*r.cpu["etcd"])
	b.r.add(takeAgentCPU, 100*r.cpu["agent"])
	b.r.add(takeFleetCPU, 100*r.cpu["fleet"])
	b.r.add(revoked, a.Took.Seconds())
	b.r.add(firstTaken, first.Seconds())
	b.r.add(lastTaken, last.Seconds())
	b.r.add(allTaken, (last - first).Seconds())
	b.r.add(takenIPs, float64(n-before))
	return nil
}

// settled returns how many watch events the fleet has got once there come no more.
func (b *bench) settled(ctx context.Context) (events int64, err error) {
	for last := int64(-1); ; last = events {
		a, err := b.ask(request{Do: "count"})
		if events = a.Events; err != nil || events == last {
			return events, err
		}
		if !sleep(ctx, time.Second) {
			return events, context.Cause(ctx)
		}
	}
}

// rollout restarts agents of the fleet.
func (b *bench) rollout(ctx context.Context) error {
	if b.Rollout == 0 {
		return nil
	}
	before, err := b.ask(request{Do: "count"})
	if err != nil {
		return err
	}
	var a reply
	r, err := b.during(ctx, func(context.Context) (err error) {
		a, err = b.ask(request{Do: "rollout", Parallel: b.AtOnce, For: b.Config.Rollout})
		return err
	})
	if err != nil {
		return err
	}
	b.r.add(rolled, float64(a.Done))
	b.r.add(rolloutFailed, float64(a.Failed))
	b.r.add(rolloutTook, a.Took.Seconds())
	b.r.add(rolloutRate, float64(a.Done)/a.Took.Seconds())
	b.r.add(rolloutList, float64(a.Listed)/1e6)
	b.r.add(rolloutSeen, float64(a.Events-before.Events)/max(1, float64(a.Done)))
	b.r.add(rolloutEtcdCPU, 100*r.cpu["etcd"])
	b.r.add(rolloutFleetCPU, 100*r.cpu["fleet"])
	b.r.add(rolloutAgentCPU, 100*r.cpu["agent"])
	return b.memories(rolloutEtcdMB, rolloutCrdsyncMB, rolloutAgentMB)
}

// podOf returns the i-th pod of a node, around.
func (c Cluster) podOf(node, i int) int {
	each := c.Pods / c.Nodes
	i %= each
	for pod := i * c.Nodes; ; pod++ { // within one turn each node has one
		if c.node(pod) == node {
			return pod
		}
	}
}

// other returns an app with an egress that a pod has not, another one for each i.
func (b *bench) other(pod, i int) int {
	c, now := b.Cluster, b.Cluster.app(pod)
	if app, changed := b.apps[pod]; changed {
		now = app
	}
	for app := i % c.apps(); ; app = (app + 1) % c.apps() {
		if app != now && c.egress(pod, app) != "" {
			return app
		}
	}
}
