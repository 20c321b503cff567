package failover

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/integration/lab"
)

// Faults are what can happen to the owner of the egress IP: it is powered off, its uplink loses its carrier, it is drained, its IP is moved.
var Faults = []string{"power-off", "uplink", "drain", "move"}

// Config says what to measure. Lab.Nodes must be 3 at least: the pod's node is no candidate, but for moves, which go around all nodes.
type Config struct {
	Lab   lab.Config
	Fault string // one of Faults
	Runs  int    // 1 at least
}

// Validate reports every fault of the configuration.
func (c Config) Validate() error {
	var errs []error
	if !slices.Contains(Faults, c.Fault) {
		errs = append(errs, fmt.Errorf("fault %q: want one of %q", c.Fault, Faults))
	}
	if c.Runs < 1 {
		errs = append(errs, fmt.Errorf("%d runs: want 1 at least", c.Runs))
	}
	if c.Lab.Nodes < 3 {
		errs = append(errs, fmt.Errorf("%d nodes: want 3 at least, the pod's, the owner and an heir", c.Lab.Nodes))
	}
	return errors.Join(errs...)
}

const (
	interval = time.Millisecond // of the probe
	before   = 300 * time.Millisecond
	// after is how long the probe goes on when there is a new owner, which waits for half a second before it uses the IP.
	after = time.Second
	limit = 20 * time.Second // for a new owner to appear
	// joining is how long a node that was away is given: the agents' gossip calls those that it misses every second.
	joining = 3 * time.Second
)

// objects are a pool that leaves out the pod's node, which is to be filled in, and the egress of the pod.
const objects = `{"apiVersion": "v1", "kind": "List", "items": [
{"apiVersion": "crd.antrea.io/v1beta1", "kind": "ExternalIPPool", "metadata": {"name": "failover"}, "spec": {
  "ipRanges": [{"start": "10.10.0.11", "end": "10.10.0.11"}],
  "nodeSelector": {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "NotIn", "values": ["%s"]}]}}},
{"apiVersion": "crd.antrea.io/v1beta1", "kind": "Egress", "metadata": {"name": "failover"}, "spec": {
  "externalIPPool": "failover", "appliedTo": {"podSelector": {"matchLabels": {"app": "failover"}}}}}]}`

const pod = "failover/pod"

var ip = netip.MustParseAddr("10.10.0.11")

// Result is what one run cost.
type Result struct {
	Gap  time.Duration // the longest time in which no datagram was sent that was answered
	Lost int           // datagrams without an answer
}

type bench struct {
	Config
	lab  *lab.Lab
	etcd *clientv3.Client
}

// Run makes a lab, lets the fault happen, and removes the lab, also when ctx ends before. It returns the result of each run, and calls told
// after each; an error ends it, with the results until then. A packet with another source than the egress IP, or with
// another source port than those before, is an error.
func Run(ctx context.Context, cfg Config, told func(run int, r Result)) (results []Result, err error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	b := &bench{Config: cfg}
	if b.lab, err = lab.Up(ctx, cfg.Lab); err != nil {
		return nil, err
	}
	defer func() {
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		err = errors.Join(err, b.lab.Down(end))
	}()
	if b.etcd, err = clientv3.New(clientv3.Config{Endpoints: b.lab.EtcdEndpoints(), Logger: zap.NewNop()}); err != nil {
		return nil, fmt.Errorf("making a client of etcd: %w", err)
	}
	defer b.etcd.Close()
	if err := b.prepare(ctx); err != nil {
		return nil, err
	}
	for run := range cfg.Runs {
		r, err := b.once(ctx)
		if err != nil {
			return results, fmt.Errorf("run %d: %w", run+1, err)
		}
		results = append(results, r)
		told(run+1, r)
	}
	return results, nil
}

// prepare makes egress and pod, and waits until the pod leaves with the egress IP.
func (b *bench) prepare(ctx context.Context) error {
	home := lab.NodeName(b.Lab.Nodes)
	dir, err := os.MkdirTemp("", "egret-failover-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "objects.json")
	left := home
	if b.Fault == "move" {
		left = "" // no node
	}
	if err := os.WriteFile(path, fmt.Appendf(nil, objects, left), 0o644); err != nil {
		return err
	}
	if out, err := b.lab.Kubectl(ctx, "apply", "-f", path); err != nil {
		return fmt.Errorf("making the egress: %w\n%s", err, out)
	}
	if _, err := b.lab.Pod(ctx, lab.PodConfig{Name: pod, Node: home, Labels: map[string]string{"app": "failover"}}); err != nil {
		return err
	}
	if _, err := b.owner(ctx, ""); err != nil {
		return err
	}
	for deadline := time.Now().Add(limit); ; {
		got, err := b.lab.Source(ctx, pod)
		if err == nil && got == ip {
			return sleep(ctx, joining)
		}
		if ctx.Err() != nil || time.Now().After(deadline) {
			return fmt.Errorf("pod %s left as %v (%v), want %s", pod, got, err, ip)
		}
		if err := sleep(ctx, 100*time.Millisecond); err != nil {
			return err
		}
	}
}

// owner waits until another node than not owns the IP.
func (b *bench) owner(ctx context.Context, not string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		r, err := b.etcd.Get(ctx, "/egret/owners/"+ip.String())
		if err != nil {
			return "", fmt.Errorf("waiting for an owner of %s other than %q: %w", ip, not, err)
		}
		for _, kv := range r.Kvs {
			var o egress.Owner
			if err := json.Unmarshal(kv.Value, &o); err != nil {
				return "", fmt.Errorf("reading the owner of %s: %w", ip, err)
			}
			if o.Node != not {
				return o.Node, nil
			}
		}
		if err := sleep(ctx, 50*time.Millisecond); err != nil {
			return "", fmt.Errorf("waiting for an owner of %s other than %q: %w", ip, not, err)
		}
	}
}

// once lets the fault happen under a probe, and mends it.
func (b *bench) once(ctx context.Context) (Result, error) {
	gateway, err := b.owner(ctx, "")
	if err != nil {
		return Result{}, err
	}
	inject, mend, settle := b.fault(gateway)
	probing, end := context.WithCancel(ctx)
	defer end()
	var result lab.ProbeResult
	done := make(chan error, 1)
	go func() {
		var err error
		result, err = b.lab.Probe(probing, pod, interval, 2*limit)
		done <- err
	}()
	err = sleep(ctx, before)
	if err == nil {
		err = inject(ctx)
	}
	if err == nil {
		_, err = b.owner(ctx, gateway)
	}
	if err == nil {
		err = sleep(ctx, after)
	}
	end()
	if err := errors.Join(err, <-done, mend(context.WithoutCancel(ctx)), sleep(ctx, settle)); err != nil {
		return Result{}, err
	}
	if len(result.Sources) != 1 || result.Sources[ip] == 0 {
		return Result{}, fmt.Errorf("the outside host saw the sources %v, want %s only", result.Sources, ip)
	}
	if len(result.Ports) != 1 {
		return Result{}, fmt.Errorf("the outside host saw the source ports %v, want one: the connection would have broken", result.Ports)
	}
	if result.Tail > after/3 {
		return Result{}, fmt.Errorf("no answer for %v, %v after there was a new owner", result.Tail, after)
	}
	return Result{result.LongestGap, result.Lost}, nil
}

// fault returns what makes the fault and mends it, and how long the lab takes until all is as before.
func (b *bench) fault(node string) (inject, mend func(context.Context) error, settle time.Duration) {
	egret := func(args ...string) func(context.Context) error {
		return func(ctx context.Context) error {
			out, err := b.lab.Egret(ctx, args...)
			if err != nil {
				return fmt.Errorf("egret %q: %w\n%s", args, err, out)
			}
			return nil
		}
	}
	switch b.Fault {
	case "power-off":
		return func(ctx context.Context) error { return b.lab.Crash(ctx, node) },
			func(ctx context.Context) error { return b.lab.Recover(ctx, node) }, joining
	case "uplink":
		return func(ctx context.Context) error { return b.lab.Cut(ctx, node, "uplink") },
			func(ctx context.Context) error { return b.lab.Heal(ctx, node, "uplink") }, joining
	case "drain":
		return egret("drain", node, "--wait"), egret("uncordon", node), 0
	default:
		nodes := make([]string, b.Lab.Nodes)
		for i := range nodes {
			nodes[i] = lab.NodeName(i + 1)
		}
		to := nodes[(slices.Index(nodes, node)+1)%len(nodes)]
		return egret("move", ip.String(), "--to", to), func(context.Context) error { return nil }, 0
	}
}

// WriteCSV writes a header and a line per run: fault, number of nodes, gap in milliseconds, datagrams lost.
func WriteCSV(w io.Writer, cfg Config, results []Result) error {
	text := []byte("fault,nodes,gap_ms,lost\n")
	for _, r := range results {
		text = fmt.Appendf(text, "%s,%d,%.1f,%d\n", cfg.Fault, cfg.Lab.Nodes, ms(r.Gap), r.Lost)
	}
	_, err := w.Write(text)
	return err
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// Quantile returns the smallest gap that a share of q of the gaps does not exceed (nearest rank), q above 0 and up to 1; 0 without results.
func Quantile(results []Result, q float64) time.Duration {
	if len(results) == 0 {
		return 0
	}
	sorted := sortedGaps(results)
	rank := int(q * float64(len(sorted)))
	if float64(rank) < q*float64(len(sorted)) {
		rank++
	}
	return sorted[min(max(rank, 1), len(sorted))-1]
}

// sortedGaps returns the gaps, the shortest first.
func sortedGaps(results []Result) []time.Duration {
	gaps := make([]time.Duration, len(results))
	for i, r := range results {
		gaps[i] = r.Gap
	}
	slices.Sort(gaps)
	return gaps
}

// sleep waits for d, or returns why ctx ended.
func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}
