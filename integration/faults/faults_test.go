package faults

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/egret-project/egret/integration/lab"
)

// limit is how long after the last fault was healed every egress IP has to be in service again.
const limit = 5 * time.Second

func TestInvariantsHoldUnderRandomFaults(t *testing.T) {
	a := open(t)
	seed := *seedFlag
	if seed == 0 {
		seed = uint64(time.Now().UnixNano()) % 1_000_000
	}
	t.Logf("seed %d", seed)
	count := map[string]int{}
	if *roundFlag >= 0 {
		round(t, a, seed, *roundFlag, count)
	} else {
		for r, end := 0, time.Now().Add(*timeFlag); time.Now().Before(end) && !t.Failed(); r++ {
			round(t, a, seed, r, count)
		}
	}
	total := 0
	for _, n := range count {
		total += n
	}
	t.Logf("seed %d: %d faults and healings: %v", seed, total, count)
}

// Seeds that failed once, and what failed.
var regressions = []struct {
	name  string
	seed  uint64
	round int
}{
	{"a gateway that boots sends nothing with its own address", 1, 3},
	{"a gateway that boots beside frozen ones sends nothing with its own address", 931524, 6},
	{"a node that boots twice within seconds is judged from each boot on", 800881, 1},
}

func TestSchedulesThatFailedOnce(t *testing.T) {
	for _, r := range regressions {
		t.Run(r.name, func(t *testing.T) { round(t, open(t), r.seed, r.round, map[string]int{}) })
	}
}

// round injects one schedule under probes and judges. It counts what it did by the verbs.
func round(t *testing.T, a *arena, seed uint64, number int, count map[string]int) {
	t.Helper()
	steps := Schedule(seed, number)
	fail := func(what string, err error) {
		t.Helper()
		if err == nil {
			return
		}
		var table strings.Builder
		for _, s := range steps {
			fmt.Fprintln(&table, s)
		}
		t.Errorf("seed %d, round %d: %s: %v\nto run it again: make test-faults SEED=%d ROUND=%d\n%s", seed, number, what, err, seed, number, &table)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	endPush, err := a.push(ctx)
	if err != nil {
		t.Fatal(err)
	}
	end := a.probe(ctx, 5*time.Minute)
	booted := map[string]bool{}
	run := &runner{arena: a, log: t.Logf}
	began := time.Now()
	for _, s := range steps {
		time.Sleep(time.Until(began.Add(s.At))) // the schedule
		if err := run.do(ctx, s); err != nil {
			fail(s.String(), err)
			break
		}
		count[s.Verb]++
		booted[s.Target] = booted[s.Target] || s.Verb == "recover"
	}
	healed := time.Now()
	run.asked.Wait()
	err = eventually(ctx, time.Until(healed.Add(limit)), func() error { return a.serves(ctx) })
	settled := time.Since(healed)
	fail("not all is in service after everything was healed", err)
	if err != nil {
		a.explain(t)
	}
	// Until then a node that was found to be gone before it was healed may still lose its IPs; what the probes lose
	// afterwards is lost for no reason.
	time.Sleep(time.Until(healed.Add(limit)) + 500*time.Millisecond)
	flows, err := end()
	fail("probing", err)
	// A pod's node keeps its connections: they outlive everything but that.
	fail("open connections", endPush(func(node string) bool { return booted[node] }))
	sent, lost, gap := 0, 0, time.Duration(0)
	for _, f := range flows {
		sent, lost, gap = sent+f.Sent, lost+f.Lost, max(gap, f.LongestGap)
		if f.Tail > 300*time.Millisecond {
			fail("probing", fmt.Errorf("%s was not answered as %s for the last %v", f.pod, f.ip, f.Tail))
		}
		for ip, n := range f.Sources {
			if ip != f.ip && !(booted[f.node] && own(f.node, ip)) {
				fail("probing", fmt.Errorf("%s: %d packets left as %s, want %s", f.pod, n, ip, f.ip))
			}
		}
	}
	fail("judging", a.judge(ctx))
	t.Logf("round %d: %d steps in %v, in service %v after the last; %d of %d packets lost, longest gap %v",
		number, len(steps), healed.Sub(began).Round(time.Millisecond), settled.Round(time.Millisecond), lost, sent, gap.Round(time.Millisecond))
	if t.Failed() {
		a.keepLogs(t)
	}
}

// own reports whether ip is one of the node's own addresses.
func own(node string, ip netip.Addr) bool {
	n, err := strconv.Atoi(strings.TrimPrefix(node, "node-"))
	if err != nil {
		return false
	}
	for _, own := range lab.NodeIPs(n) {
		if own == ip {
			return true
		}
	}
	return false
}

// runner does the steps of a schedule.
type runner struct {
	*arena
	log   func(string, ...any)
	asked sync.WaitGroup // what may be refused, and is not waited for
}

func (r *runner) do(ctx context.Context, s Step) error {
	node, isNode := s.Target, strings.HasPrefix(s.Target, "node-")
	process := func(f func(context.Context, string, string) error) error {
		if isNode {
			return f(ctx, "agent", node)
		}
		return f(ctx, s.Target, "")
	}
	switch s.Verb {
	case "crash":
		return r.Crash(ctx, node)
	case "recover":
		for _, c := range r.clients {
			if c.node == node {
				r.Booting(c.pod, c.node)
			}
		}
		return r.Recover(ctx, node)
	case "freeze":
		return r.Freeze(ctx, node)
	case "thaw":
		return r.Thaw(ctx, node)
	case "stop":
		return process(r.Lab.Stop)
	case "start":
		return process(r.Start)
	case "kill":
		return process(r.Kill)
	case "restart":
		return errors.Join(process(r.Lab.Stop), process(r.Start))
	case "cut", "heal":
		f := r.Cut
		if s.Verb == "heal" {
			f = r.Heal
		}
		var errs []error
		for what := range strings.SplitSeq(s.What, "+") {
			errs = append(errs, f(ctx, node, what))
		}
		return errors.Join(errs...)
	case "drain", "uncordon":
		verb := map[string]string{"drain": "cordon", "uncordon": "uncordon"}[s.Verb]
		_, err := r.Egret(ctx, verb, node)
		return err
	case "move":
		n, err := strconv.Atoi(s.What)
		if err != nil {
			return err
		}
		r.asked.Go(func() {
			// It may be refused, or come to nothing: the target is broken, say.
			if _, err := r.Egret(ctx, "move", r.ips()[n].String(), "--to", node); err != nil {
				r.log("%s: %v", s, err)
			}
		})
		return nil
	case "pod":
		_, err := r.Pod(ctx, lab.PodConfig{Name: space + "/churn-" + node, Node: node, Labels: map[string]string{"app": "one"}})
		return err
	case "unpod":
		return r.RemovePod(ctx, space+"/churn-"+node)
	case "unlabel", "label":
		label := map[string]string{"unlabel": "egress-", "label": "egress=yes"}[s.Verb]
		_, err := r.Kubectl(ctx, "label", "--overwrite", "node", node, label)
		return err
	case "extend", "shrink":
		last := netip.MustParseAddr(ranges[s.Target][1])
		if s.Verb == "extend" {
			last = last.Next()
		}
		return r.patch(ctx, s.Target, `{"spec": {"ipRanges": [{"start": %q, "end": %q}]}}`, ranges[s.Target][0], last)
	case "narrow":
		return r.patch(ctx, s.Target, `{"spec": {"nodeSelector": {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "NotIn", "values": [%q]}]}}}`, s.What)
	case "widen":
		return r.patch(ctx, s.Target, `{"spec": {"nodeSelector": {"matchExpressions": null}}}`)
	}
	return fmt.Errorf("%q: no such verb", s.Verb)
}

func (r *runner) patch(ctx context.Context, pool, format string, args ...any) error {
	_, err := r.Kubectl(ctx, "patch", "externalippool", pool, "--type", "merge", "-p", fmt.Sprintf(format, args...))
	return err
}
