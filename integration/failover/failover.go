package failover

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"time"

	"github.com/egret-project/egret/integration/cdf"
	"github.com/egret-project/egret/integration/gateway"
	"github.com/egret-project/egret/integration/lab"
)

// Faults are what can happen to the owner of the egress IP: it is powered off, its uplink loses its carrier, it is
// drained, its IP is moved.
var Faults = []string{gateway.PowerOff, gateway.Uplink, gateway.Drain, gateway.Move}

// Config says what to measure. Lab.Nodes must be 2 at least. The pod's node is no candidate, but for
// moves, which go around all nodes, and where there is only one more: that one is the owner when the fault comes.
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
	if c.Lab.Nodes < 2 {
		errs = append(errs, fmt.Errorf("%d nodes: want 2 at least, the owner and an heir", c.Lab.Nodes))
	}
	return errors.Join(errs...)
}

const (
	interval = time.Millisecond // of the probe
	before   = 300 * time.Millisecond
	// after is how long the probe goes on when there is a new owner, which waits for half a second before it uses the
	// IP.
	after = time.Second
	limit = 40 * time.Second // of a run, whose probe ends when there is a new owner
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
	lab     *lab.Lab
	gateway *gateway.Gateway
}

// Run makes a lab, lets the fault happen, and removes the lab, also when ctx ends before. It returns the result of each
// run, and calls done after each; an error ends it, with the results until then. A packet with another source than the
// egress IP, or with another source port than those before, is an error.
func Run(ctx context.Context, cfg Config, done func(run int, r Result)) (results []Result, err error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	b := &bench{Config: cfg}
	if b.lab, err = lab.Up(ctx, cfg.Lab); err != nil {
		return nil, err
	}
	defer b.lab.DownAfter(ctx, &err)
	if b.gateway, err = gateway.Open(b.lab, ip); err != nil {
		return nil, err
	}
	defer b.gateway.Close()
	if err := b.prepare(ctx); err != nil {
		return nil, err
	}
	for run := range cfg.Runs {
		r, err := b.once(ctx)
		if err != nil {
			return results, fmt.Errorf("run %d: %w", run+1, err)
		}
		results = append(results, r)
		done(run+1, r)
	}
	return results, nil
}

// prepare makes egress and pod, and waits until the pod leaves with the egress IP.
func (b *bench) prepare(ctx context.Context) error {
	left := b.home()
	if b.Fault == gateway.Move || b.Lab.Nodes == 2 {
		left = "" // no node
	}
	if err := gateway.Apply(ctx, b.lab, fmt.Sprintf(objects, left)); err != nil {
		return err
	}
	if _, err := b.lab.Pod(ctx, lab.PodConfig{Name: pod, Node: b.home(), Labels: map[string]string{"app": "failover"}}); err != nil {
		return err
	}
	if _, err := b.gateway.Owner(ctx, ""); err != nil {
		return err
	}
	if err := gateway.Leaves(ctx, b.lab, pod, ip); err != nil {
		return err
	}
	return gateway.Sleep(ctx, gateway.Joining)
}

// once lets the fault happen under a probe, and mends it.
func (b *bench) once(ctx context.Context) (Result, error) {
	owner, err := b.gateway.Owner(ctx, "")
	if err != nil {
		return Result{}, err
	}
	if b.Lab.Nodes == 2 && owner == b.home() && b.Fault != gateway.Move {
		if owner, err = b.away(ctx, owner); err != nil {
			return Result{}, err
		}
	}
	fault, err := b.gateway.Fault(b.Fault, owner, b.nodes())
	if err != nil {
		return Result{}, err
	}
	probing, end := context.WithCancel(ctx)
	defer end()
	var result lab.ProbeResult
	done := make(chan error, 1)
	go func() {
		var err error
		result, err = b.lab.Probe(probing, pod, interval, limit)
		done <- err
	}()
	err = gateway.Sleep(ctx, before)
	if err == nil {
		err = fault.Inject(ctx)
	}
	if err == nil {
		_, err = b.gateway.Owner(ctx, owner)
	}
	if err == nil {
		err = gateway.Sleep(ctx, after)
	}
	end()
	if err := errors.Join(err, <-done, fault.Mend(context.WithoutCancel(ctx)), gateway.Sleep(ctx, fault.Settle)); err != nil {
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

// home returns the pod's node: of two, that with the later name.
func (b *bench) home() string { return lab.NodeName(b.Lab.Nodes) }

// away moves the IP away from its owner, and returns the next one.
func (b *bench) away(ctx context.Context, owner string) (string, error) {
	move, err := b.gateway.Fault(gateway.Move, owner, b.nodes())
	if err == nil {
		err = move.Inject(ctx)
	}
	if err == nil {
		owner, err = b.gateway.Owner(ctx, owner)
	}
	if err != nil {
		return "", err
	}
	return owner, gateway.Sleep(ctx, gateway.Joining)
}

// nodes returns the names of all nodes.
func (b *bench) nodes() []string {
	var names []string
	for i := range b.Lab.Nodes {
		names = append(names, lab.NodeName(i+1))
	}
	return names
}

// WriteCSV writes a header and a line per run: fault, number of nodes, gap in milliseconds, datagrams lost.
func WriteCSV(w io.Writer, cfg Config, results []Result) error {
	text := []byte("fault,nodes,gap_ms,lost\n")
	for _, r := range results {
		text = fmt.Appendf(text, "%s,%d,%.1f,%d\n", cfg.Fault, cfg.Lab.Nodes, cdf.Milliseconds(r.Gap), r.Lost)
	}
	_, err := w.Write(text)
	return err
}

// Quantile returns the smallest gap that a share of q of the gaps does not exceed (nearest rank), q above 0 and up to
// 1; 0 without results.
func Quantile(results []Result, q float64) time.Duration { return cdf.Quantile(gaps(results), q) }

func gaps(results []Result) []time.Duration {
	all := make([]time.Duration, len(results))
	for i, r := range results {
		all[i] = r.Gap
	}
	return all
}

// WriteSVG draws the share of the runs whose gap is not above x, from 0 to the longest gap.
func WriteSVG(w io.Writer, cfg Config, results []Result) error {
	q := func(q float64) float64 { return cdf.Milliseconds(Quantile(results, q)) }
	return cdf.WriteSVG(w, cdf.Plot{
		Title:  fmt.Sprintf("%s, %d nodes, %d runs: p50 %.0f ms, p99 %.0f ms", cfg.Fault, cfg.Lab.Nodes, len(results), q(0.5), q(0.99)),
		Axis:   "ms without an answer",
		Curves: []cdf.Curve{{Name: cfg.Fault, Values: gaps(results)}},
	})
}
