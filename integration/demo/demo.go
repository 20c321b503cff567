// Package demo shows Egret to somebody who has never seen it: the guide's high-availability example in a lab, step by
// step, each step checked. It owns nothing but the lab that it makes and removes.
package demo

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/egret-project/egret/integration/lab"
	"github.com/egret-project/egret/manifests"
)

// example is the guide's high-availability example, verbatim.
var example = []string{"00-external-ip-pool.yaml", "egress-prod-web.yaml", "egress-staging-web.yaml"}

// pods are the demo's, by name; the guide's egresses select those with the label app=web in prod and staging.
var pods = []struct{ name, node, app, egress string }{
	{"prod/web-1", "node-1", "web", "egress-prod-web"},
	{"prod/web-2", "node-2", "web", "egress-prod-web"},
	{"prod/web-3", "node-3", "web", "egress-prod-web"},
	{"prod/db-1", "node-1", "db", ""},
	{"staging/web-1", "node-1", "web", "egress-staging-web"},
	{"staging/web-2", "node-2", "web", "egress-staging-web"},
	{"staging/web-3", "node-3", "web", "egress-staging-web"},
	{"other/web-2", "node-2", "web", ""},
}

type demo struct {
	lab     *lab.Lab
	w       io.Writer
	started time.Time
}

// Run makes a lab, shows the example in it, and removes the lab, also when ctx ends before. It returns nil only when
// every step showed what it should.
func Run(ctx context.Context, cfg lab.Config, w io.Writer) (err error) {
	d := &demo{w: w, started: time.Now()}
	d.step("a cluster in a box: etcd, kube-apiserver, crdsync, %d nodes with an agent each, a host outside", 3)
	cfg.Nodes = 3
	cfg.Log = slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey || a.Key == slog.LevelKey {
			return slog.Attr{}
		}
		return a
	}}))
	if d.lab, err = lab.Up(ctx, cfg); err != nil {
		return err
	}
	defer func() {
		d.lab.DownAfter(ctx, &err)
		if err == nil {
			fmt.Fprintf(w, "\ndemo: passed\n")
		}
	}()
	for _, step := range []func(context.Context) error{d.apply, d.show, d.powerOff, d.inspect, d.move} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

// step prints what comes next.
func (d *demo) step(format string, a ...any) {
	fmt.Fprintf(d.w, "\n== %s  (%.0fs)\n", fmt.Sprintf(format, a...), time.Since(d.started).Seconds())
}

// run prints a command and what it prints.
func (d *demo) run(ctx context.Context, name string, run func(context.Context, ...string) ([]byte, error), args ...string) (string, error) {
	fmt.Fprintf(d.w, "$ %s %s\n", name, strings.Join(args, " "))
	out, err := run(ctx, args...)
	for line := range bytes.Lines(out) {
		fmt.Fprintf(d.w, "  %s", line)
	}
	if err != nil {
		return "", fmt.Errorf("%s %s: %w", name, strings.Join(args, " "), err)
	}
	return string(out), nil
}

func (d *demo) kubectl(ctx context.Context, args ...string) (string, error) {
	return d.run(ctx, "kubectl", d.lab.Kubectl, args...)
}

func (d *demo) egret(ctx context.Context, args ...string) (string, error) {
	return d.run(ctx, "egret", d.lab.Egret, args...)
}

// apply makes the pods, and applies the manifests of the guide.
func (d *demo) apply(ctx context.Context) error {
	d.step("pods on every node, and the guide's example")
	for _, p := range pods {
		if _, err := d.lab.Pod(ctx, lab.PodConfig{Name: p.name, Node: p.node, Labels: map[string]string{"app": p.app}}); err != nil {
			return err
		}
		fmt.Fprintf(d.w, "pod %-14s app=%-4s on %s\n", p.name, p.app, p.node)
	}
	dir, err := os.MkdirTemp("", "egret-demo-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	for _, name := range example {
		b, err := manifests.FS.ReadFile("examples/" + name)
		if err != nil {
			return err
		}
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o644); err != nil {
			return err
		}
		fmt.Fprintf(d.w, "%s\n", indent(b))
		if _, err := d.kubectl(ctx, "apply", "-f", path); err != nil {
			return err
		}
	}
	return nil
}

// show waits until both egresses have an IP and a node, and compares the source address of every pod.
func (d *demo) show(ctx context.Context) error {
	d.step("each egress has an IP of the pool, and a node")
	if err := d.until(ctx, 20*time.Second, func(e map[string]egressStatus) error {
		for name, s := range e {
			if !s.ip.IsValid() || s.node == "" {
				return fmt.Errorf("egress %s has no IP or no node", name)
			}
		}
		return nil
	}); err != nil {
		return err
	}
	out, err := d.kubectl(ctx, "get", "egress")
	if err != nil {
		return err
	}
	if got := strings.Fields(strings.SplitN(out, "\n", 2)[0]); !slices.Equal(got, []string{"NAME", "EGRESSIP", "AGE", "NODE"}) {
		return fmt.Errorf("kubectl get egress: columns %v, want NAME EGRESSIP AGE NODE", got)
	}
	return d.sources(ctx, "")
}

// sources prints the source address that the outside host saw for every pod, and compares it with what it should be.
// The pods of a node that is off are left out.
func (d *demo) sources(ctx context.Context, off string) error {
	d.step("the source address that the outside host sees")
	status, err := d.egresses(ctx)
	if err != nil {
		return err
	}
	fmt.Fprintf(d.w, "  %-15s %-7s %-12s %s\n", "POD", "NODE", "SOURCE", "WHICH IS")
	for _, p := range pods {
		if p.node == off {
			continue
		}
		want, which := lab.NodeIP(int(p.node[len("node-")]-'0')), "the node's address: no egress selects it"
		if p.egress != "" {
			s := status[p.egress]
			want, which = s.ip, "the IP of "+p.egress+", remote: it leaves from "+s.node
			if s.node == p.node {
				which = "the IP of " + p.egress + ", local to its gateway"
			}
		}
		got, err := d.source(ctx, p.name, want)
		if err != nil {
			return err
		}
		fmt.Fprintf(d.w, "  %-15s %-7s %-12s %s\n", p.name, p.node, got, which)
	}
	return nil
}

// source connects from the pod until the outside host sees want; the first connection may be earlier than the agent's
// knowledge of its pod, or of a new owner.
func (d *demo) source(ctx context.Context, pod string, want netip.Addr) (netip.Addr, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for {
		try, cancel := context.WithTimeout(ctx, time.Second)
		got, err := d.lab.Source(try, pod)
		cancel()
		if err == nil && got == want {
			return got, nil
		}
		if !sleep(ctx, 100*time.Millisecond) {
			return got, fmt.Errorf("pod %s: the outside host saw %v (%v), want %s", pod, got, err, want)
		}
	}
}

// powerOff powers the gateway of prod off under a running probe.
func (d *demo) powerOff(ctx context.Context) error {
	status, err := d.egresses(ctx)
	if err != nil {
		return err
	}
	before := status["egress-prod-web"]
	pod := podOff(before.node)
	d.step("power off %s, the gateway of egress-prod-web, under a probe of %s every 1 ms", before.node, pod)
	result := make(chan error, 1)
	var probe lab.ProbeResult
	go func() {
		var err error
		probe, err = d.lab.Probe(ctx, pod, time.Millisecond, 8*time.Second)
		result <- err
	}()
	if !sleep(ctx, time.Second) {
		return ctx.Err()
	}
	if err := d.lab.Crash(ctx, before.node); err != nil {
		return err
	}
	fmt.Fprintf(d.w, "%s is off\n", before.node)
	if err := d.until(ctx, 20*time.Second, func(e map[string]egressStatus) error {
		if s := e["egress-prod-web"]; s.node == "" || s.node == before.node {
			return fmt.Errorf("egress-prod-web is on %q", s.node)
		}
		return nil
	}); err != nil {
		return err
	}
	if err := <-result; err != nil {
		return err
	}
	if _, err := d.kubectl(ctx, "get", "egress"); err != nil {
		return err
	}
	fmt.Fprintf(d.w, "the pods were without it for %v; source addresses seen: %v\n", probe.LongestGap.Round(time.Millisecond), probe.Sources)
	if probe.Sources[before.ip] == 0 || len(probe.Sources) != 1 {
		return fmt.Errorf("probe over the power-off: sources %v, want %s only", probe.Sources, before.ip)
	}
	if limit := 5 * time.Second; probe.LongestGap > limit {
		return fmt.Errorf("probe over the power-off: %v without an answer, want at most %v", probe.LongestGap, limit)
	}
	if err := d.sources(ctx, before.node); err != nil {
		return err
	}
	d.step("%s is back; it takes nothing away", before.node)
	if err := d.lab.Recover(ctx, before.node); err != nil {
		return err
	}
	after, err := d.egresses(ctx)
	if err != nil {
		return err
	}
	if after["egress-prod-web"].node == before.node {
		return fmt.Errorf("egress-prod-web went back to %s by itself", before.node)
	}
	_, err = d.egret(ctx, "get", "nodes")
	return err
}

// inspect prints what etcd holds.
func (d *demo) inspect(ctx context.Context) error {
	d.step("what etcd holds")
	for _, kind := range []string{"allocations", "owners"} {
		out, err := d.egret(ctx, "get", kind)
		if err != nil {
			return err
		}
		if n := strings.Count(out, "\n"); n != 3 {
			return fmt.Errorf("egret get %s: %d lines, want a header and two records", kind, n)
		}
	}
	return nil
}

// move moves the IP of staging by hand, under a probe.
func (d *demo) move(ctx context.Context) error {
	status, err := d.egresses(ctx)
	if err != nil {
		return err
	}
	before := status["egress-staging-web"]
	to := "node-1"
	if before.node == to {
		to = "node-2"
	}
	pod := "staging/web-3"
	if before.node == "node-3" || to == "node-3" {
		pod = "staging/web-2"
	}
	if i := slices.IndexFunc(pods, func(p struct{ name, node, app, egress string }) bool {
		return p.egress == "egress-staging-web" && p.node != before.node && p.node != to
	}); i >= 0 {
		pod = pods[i].name
	}
	d.step("move %s from %s to %s by hand, under a probe of %s every 1 ms", before.ip, before.node, to, pod)
	result := make(chan error, 1)
	var probe lab.ProbeResult
	go func() {
		var err error
		probe, err = d.lab.Probe(ctx, pod, time.Millisecond, 4*time.Second)
		result <- err
	}()
	if !sleep(ctx, time.Second) {
		return ctx.Err()
	}
	if _, err := d.egret(ctx, "move", before.ip.String(), "--to", to); err != nil {
		return err
	}
	if err := <-result; err != nil {
		return err
	}
	fmt.Fprintf(d.w, "sent %d, lost %d, longest gap %v; source addresses seen: %v\n", probe.Sent, probe.Lost, probe.LongestGap.Round(time.Millisecond), probe.Sources)
	if len(probe.Sources) != 1 || probe.Sources[before.ip] == 0 {
		return fmt.Errorf("probe over the move: sources %v, want %s only", probe.Sources, before.ip)
	}
	if err := d.until(ctx, 5*time.Second, func(e map[string]egressStatus) error {
		if s := e["egress-staging-web"]; s.node != to {
			return fmt.Errorf("egress-staging-web is on %q, want %s", s.node, to)
		}
		return nil
	}); err != nil {
		return err
	}
	if _, err := d.kubectl(ctx, "get", "egress"); err != nil {
		return err
	}
	return d.sources(ctx, "")
}

type egressStatus struct {
	ip   netip.Addr
	node string
}

// egresses returns the status of the demo's egresses.
func (d *demo) egresses(ctx context.Context) (map[string]egressStatus, error) {
	out, err := d.lab.Kubectl(ctx, "get", "egress", "-o", `jsonpath={range .items[*]}{.metadata.name},{.status.egressIP},{.status.egressNode}{"\n"}{end}`)
	if err != nil {
		return nil, fmt.Errorf("kubectl get egress: %w\n%s", err, out)
	}
	all := map[string]egressStatus{}
	for line := range strings.Lines(string(out)) {
		f := strings.Split(strings.TrimSpace(line), ",")
		ip, _ := netip.ParseAddr(f[1]) // empty as long as there is none
		all[f[0]] = egressStatus{ip, f[2]}
	}
	if len(all) != 2 {
		return nil, fmt.Errorf("kubectl get egress: %d egresses, want 2", len(all))
	}
	return all, nil
}

// until waits for ok to find nothing wrong, and returns what it found last when that takes too long.
func (d *demo) until(ctx context.Context, limit time.Duration, ok func(map[string]egressStatus) error) error {
	bounded, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		e, err := d.egresses(bounded)
		if err == nil {
			err = ok(e)
		}
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if !sleep(bounded, 100*time.Millisecond) {
			return fmt.Errorf("after %v: %w", limit, err)
		}
	}
}

// podOff returns a pod of prod that is not on the node.
func podOff(node string) string {
	i := slices.IndexFunc(pods, func(p struct{ name, node, app, egress string }) bool {
		return p.egress == "egress-prod-web" && p.node != node
	})
	return pods[i].name
}

func indent(b []byte) string {
	return "  | " + strings.ReplaceAll(strings.TrimSpace(string(b)), "\n", "\n  | ")
}

// sleep waits for d; false: ctx ended.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}
