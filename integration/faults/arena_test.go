package faults

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/integration/lab"
	"github.com/egret-project/egret/integration/witness"
)

var (
	seedFlag  = flag.Uint64("seed", 0, "of the schedule; 0: another one each time")
	roundFlag = flag.Int("round", -1, "the only round to run; -1: all")
	timeFlag  = flag.Duration("time", 2*time.Minute, "after which no round of random faults begins")
	probeFlag = flag.Duration("interval", 5*time.Millisecond, "of the probes")
)

// The lab that the tests share. It is built by the first one that needs it.
var shared *arena

func TestMain(m *testing.M) {
	if status, ok := lab.Helper(os.Args); ok {
		os.Exit(status)
	}
	flag.Parse()
	status := m.Run()
	if shared != nil {
		if err := shared.close(); err != nil {
			fmt.Fprintln(os.Stderr, "over the whole run:", err)
			status = 1
		}
	}
	os.Exit(status)
}

// client is a selected pod, and what it leaves as.
type client struct {
	pod, node, egress string
	ips               []netip.Addr
}

// arena is a lab with egresses, their pods, and a witness.
type arena struct {
	*lab.Lab
	*witness.Witness
	etcd        *clientv3.Client
	clients     []client
	allocations map[netip.Addr]string // as they were first given out; they never change
	stopAsking  context.CancelFunc
	asking      *errgroup.Group
}

// Two pools of one family each, and a pair for egresses of both. Beside the last address that is used each has two
// more.
var ranges = map[string][2]string{
	"first": {"10.10.0.11", "10.10.0.12"}, "second": {"10.10.0.21", "10.10.0.22"},
	"third-4": {"10.10.0.31", "10.10.0.33"}, "third-6": {"fd10::31", "fd10::33"},
}

var egresses = map[string][]string{"one": {"first"}, "two": {"second"}, "both": {"third-4", "third-6"}, "twins": {"third-4", "third-6"}}

const space = "faults" // the namespace of the pods

// open returns the shared arena, whole.
func open(t *testing.T) *arena {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: network namespaces")
	}
	if shared == nil {
		log := slog.New(slog.NewTextHandler(os.Stderr, nil))
		l, err := lab.Up(t.Context(), lab.Config{Name: lab.OwnName("faults"), Nodes: nodes, Log: log})
		if err != nil {
			t.Fatal(err)
		}
		a := &arena{Lab: l}
		shared = a
		if err := a.furnish(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if shared.clients == nil {
		t.Fatal("the lab could not be built")
	}
	return shared
}

func (a *arena) furnish(ctx context.Context) error {
	life := context.WithoutCancel(ctx) // of the first test
	var err error
	if a.Witness, err = witness.Start(life, a.Lab); err != nil {
		return err
	}
	if a.etcd, err = a.DialEtcd(); err != nil {
		return err
	}
	for n := range nodes {
		if _, err := a.Kubectl(ctx, "label", "node", lab.NodeName(n+1), "egress=yes"); err != nil {
			return err
		}
	}
	for _, name := range pools {
		if err := a.apply(ctx, "ExternalIPPool", name, map[string]any{
			"ipRanges":     []any{map[string]any{"start": ranges[name][0], "end": ranges[name][1]}},
			"nodeSelector": map[string]any{"matchLabels": map[string]any{"egress": "yes"}},
		}); err != nil {
			return err
		}
	}
	names := slices.Sorted(maps.Keys(egresses))
	for _, name := range names {
		spec := map[string]any{"appliedTo": map[string]any{
			"namespaceSelector": map[string]any{"matchLabels": map[string]any{"kubernetes.io/metadata.name": space}},
			"podSelector":       map[string]any{"matchLabels": map[string]any{"app": name}},
		}}
		if from := egresses[name]; len(from) == 1 {
			spec["externalIPPool"] = from[0]
		} else {
			spec["externalIPPools"] = from
		}
		if err := a.apply(ctx, "Egress", name, spec); err != nil {
			return err
		}
	}
	var clients []client
	for n := range nodes {
		c := client{pod: fmt.Sprintf("%s/client-%d", space, n+1), node: lab.NodeName(n + 1), egress: names[n%len(names)]}
		if _, err := a.Pod(ctx, lab.PodConfig{Name: c.pod, Node: c.node, Labels: map[string]string{"app": c.egress}}); err != nil {
			return err
		}
		clients = append(clients, c)
	}
	if err := eventually(ctx, 30*time.Second, func() (err error) {
		a.allocations, err = a.allocated(ctx)
		if err == nil && len(a.allocations) != addresses {
			err = fmt.Errorf("%v are allocated, want %d", a.allocations, addresses)
		}
		return err
	}); err != nil {
		return err
	}
	for i, c := range clients {
		for ip, name := range a.allocations {
			if name == c.egress {
				clients[i].ips = append(clients[i].ips, ip)
			}
		}
		slices.SortFunc(clients[i].ips, netip.Addr.Compare)
	}
	a.clients = clients
	if err := eventually(ctx, 30*time.Second, func() error { return a.serves(ctx) }); err != nil {
		a.clients = nil
		return err
	}
	for _, c := range clients {
		if err := a.Select(ctx, c.pod, c.ips...); err != nil {
			return err
		}
	}
	life, a.stopAsking = context.WithCancel(life)
	a.asking = &errgroup.Group{}
	a.asking.Go(func() error { return a.Ask(life, 50*time.Millisecond, a.ips()...) })
	return nil
}

// close removes the lab, and returns what was seen over the whole run that must never be.
func (a *arena) close() error {
	var errs []error
	if a.asking != nil {
		a.stopAsking()
		errs = append(errs, a.asking.Wait(), a.Panics(), a.Witness.Stop(), a.etcd.Close())
		fmt.Printf("changes of owners, by reason: %v\n", a.Tenures())
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	return errors.Join(append(errs, a.Down(ctx))...)
}

func (a *arena) apply(ctx context.Context, kind, name string, spec map[string]any) error {
	b, err := json.Marshal(map[string]any{
		"apiVersion": "crd.antrea.io/v1beta1", "kind": kind, "metadata": map[string]any{"name": name}, "spec": spec,
	})
	if err != nil {
		return err
	}
	file, err := os.CreateTemp("", "egret-faults-")
	if err != nil {
		return err
	}
	defer os.Remove(file.Name())
	if _, err := file.Write(b); err != nil {
		return err
	}
	_, err = a.Kubectl(ctx, "apply", "-f", file.Name())
	return errors.Join(err, file.Close())
}

// ips returns the egress IPs, sorted.
func (a *arena) ips() []netip.Addr {
	return slices.SortedFunc(maps.Keys(a.allocations), netip.Addr.Compare)
}

// allocated returns who has which address.
func (a *arena) allocated(ctx context.Context) (map[netip.Addr]string, error) {
	const prefix = "/egret/allocations/"
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	resp, err := a.etcd.Get(ctx, prefix, clientv3.WithPrefix())
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", prefix, err)
	}
	out := map[netip.Addr]string{}
	for _, kv := range resp.Kvs {
		var r egress.Allocation
		if err := json.Unmarshal(kv.Value, &r); err != nil {
			return nil, fmt.Errorf("reading %s: %w", kv.Key, err)
		}
		out[r.IP] = strings.Join(r.Egresses, ",")
	}
	return out, nil
}

// serves returns nil when every egress IP has an owner, and every client leaves as it should.
func (a *arena) serves(ctx context.Context) error {
	if err := a.Locked(ctx, a.ips()...); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	var mu sync.Mutex
	var errs []error
	var all sync.WaitGroup
	for _, c := range a.clients {
		for _, ip := range c.ips {
			all.Go(func() {
				got, err := a.SourceTo(ctx, c.pod, witness.OutsideOf(ip))
				if err == nil && got != ip {
					err = fmt.Errorf("%s left as %s, want %s", c.pod, got, ip)
				}
				mu.Lock()
				defer mu.Unlock()
				errs = append(errs, err)
			})
		}
	}
	all.Wait()
	return errors.Join(errs...)
}

// judge returns what was seen so far that must never be.
func (a *arena) judge(ctx context.Context) error {
	now, err := a.allocated(ctx)
	if err == nil && !maps.Equal(now, a.allocations) {
		err = fmt.Errorf("allocations were %v and are %v", a.allocations, now)
	}
	return errors.Join(err, a.Doubles(), a.Strangers(), a.Usurped(), a.Panics())
}

// explain logs what the nodes say of the pods that do not leave as they should, while it is so, and what their agents
// have said last.
func (a *arena) explain(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	run := func(node string, argv ...string) {
		t.Helper()
		out, err := a.Exec(ctx, "node", node, argv...)
		t.Logf("%s: %s (%v):\n%s", node, strings.Join(argv, " "), err, out)
	}
	for _, c := range a.clients {
		for _, ip := range c.ips {
			try, end := context.WithTimeout(ctx, time.Second)
			got, err := a.SourceTo(try, c.pod, witness.OutsideOf(ip))
			end()
			if err == nil && got == ip {
				continue
			}
			t.Logf("%s leaves as %s, %v; want %s", c.pod, got, err, ip)
			trace := []string{a.EgretPath(), "trace", c.pod, "--to", witness.OutsideOf(ip).String(), "--endpoints", a.AgentEndpoints(), "--insecure"}
			tell := func(node string) {
				run(node, trace...)
				run(node, "nft", "list", "ruleset")
				run(node, "ip", "neigh")
				run(node, "bridge", "fdb", "show")
				run(node, "ip", "addr")
				run(node, "ip", "rule")
				run(node, "ip", "route", "show", "table", "all")
				run(node, "ip", "-6", "route", "show", "table", "all")
				run(node, "conntrack", "-L")
			}
			tell(c.node)
			owner, err := a.Egret(ctx, "get", "owners")
			t.Logf("owners (%v):\n%s", err, owner)
			for n := range nodes {
				if node := lab.NodeName(n + 1); node != c.node && strings.Contains(string(owner), node) {
					tell(node)
				}
			}
		}
	}
	out, err := a.Exec(ctx, "outside", "", "ip", "neigh")
	t.Logf("the outside host (%v):\n%s", err, out)
	all, err := a.etcd.Get(ctx, "/egret/", clientv3.WithPrefix())
	t.Logf("etcd (%v):", err)
	if err == nil {
		for _, kv := range all.Kvs {
			t.Logf("%s %d %s", kv.Key, kv.ModRevision, kv.Value)
		}
	}
	for n := range nodes {
		b, err := os.ReadFile(a.LogFile("agent-" + lab.NodeName(n+1)))
		lines := strings.Split(strings.TrimSpace(string(b)), "\n")
		t.Logf("agent of %s (%v):\n%s", lab.NodeName(n+1), err, strings.Join(lines[max(len(lines)-500, 0):], "\n"))
	}
}

// keepLogs copies the logs of the lab to where artifacts of the test are kept (go test -artifacts).
func (a *arena) keepLogs(t *testing.T) {
	t.Helper()
	dir := t.ArtifactDir()
	if err := os.CopyFS(dir, os.DirFS(filepath.Dir(a.LogFile(etcd)))); err != nil {
		t.Logf("keeping the logs: %v", err)
	}
	history, err := a.Egret(t.Context(), "get", "owners")
	t.Logf("owners (%v):\n%s\nlogs: %s", err, history, dir)
}

// flow is a probe that runs while something is done.
type flow struct {
	client
	ip netip.Addr
	lab.ProbeResult
}

// probe sends from every client, to each family that it has an egress IP of, until the function that it returns is
// called.
func (a *arena) probe(ctx context.Context, limit time.Duration) (end func() ([]flow, error)) {
	ctx, stop := context.WithCancel(ctx)
	var mu sync.Mutex
	var flows []flow
	var g errgroup.Group
	for _, c := range a.clients {
		for _, ip := range c.ips {
			g.Go(func() error {
				r, err := a.ProbeTo(ctx, c.pod, witness.OutsideOf(ip), *probeFlag, limit)
				mu.Lock()
				defer mu.Unlock()
				flows = append(flows, flow{c, ip, r})
				return err
			})
		}
	}
	return func() ([]flow, error) {
		stop()
		err := g.Wait()
		slices.SortFunc(flows, func(a, b flow) int { return cmp.Or(cmp.Compare(a.pod, b.pod), a.ip.Compare(b.ip)) })
		return flows, err
	}
}

// push opens TCP connections from every client, to each family that it has an egress IP of, on which the outside host
// speaks, until the function that it returns is called: that one says which are lost, but for those of pods on the
// nodes that lost keeps.
func (a *arena) push(ctx context.Context) (end func(lost func(node string) bool) error, err error) {
	type stream struct {
		client
		*lab.Conversation
		end func(time.Duration) error
	}
	var streams []stream
	for _, c := range a.clients {
		for _, ip := range c.ips {
			conversation, err := a.Converse(ctx, c.pod, witness.OutsideOf(ip))
			if err != nil {
				return nil, err
			}
			streams = append(streams, stream{c, conversation, conversation.Push(100 * time.Millisecond)})
		}
	}
	return func(lost func(node string) bool) error {
		var g errgroup.Group
		for _, s := range streams {
			g.Go(func() error {
				defer s.Close()
				if err := s.end(20 * time.Second); err != nil && !lost(s.node) {
					return err
				}
				return nil
			})
		}
		return g.Wait()
	}, nil
}

// eventually repeats f until it returns nil, or returns its last error.
func eventually(ctx context.Context, limit time.Duration, f func() error) error {
	for deadline := time.Now().Add(limit); ; time.Sleep(20 * time.Millisecond) { // a poll from outside: nobody can tell
		err := f()
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			return fmt.Errorf("after %v: %w", limit, err)
		}
	}
}
