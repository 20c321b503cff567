package connections

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/integration/gateway"
	"github.com/egret-project/egret/integration/lab"
)

// Faults are what can happen to the gateway.
var Faults = []string{gateway.PowerOff, gateway.Move, gateway.Drain, gateway.Restart, gateway.Kill, gateway.Respawn, gateway.Moves}

// Config says what to measure.
type Config struct {
	// Lab.Nodes must be 4 at least. The pods are on the last two, which are no gateways but where the IP is moved: then
	// it goes around all.
	Lab         lab.Config
	Fault       string        // one of Faults
	Connections int           // of all kinds and pods together
	Family      int           // 4 or 6, of IP
	Pods        int           // half on each of two nodes; 2 at least
	OwnPorts    bool          // no two pods have the same source port; else all of them have the same ones
	Interval    time.Duration // between two messages of a connection; 10ms at least
	Wait        time.Duration // from the end of the fault until it is asked who is alive
	Log         *slog.Logger  // a line a step; nil: none
}

// Validate reports every fault of the configuration.
func (c Config) Validate() error {
	var errs []error
	if !slices.Contains(Faults, c.Fault) {
		errs = append(errs, fmt.Errorf("fault %q: want one of %q", c.Fault, Faults))
	}
	if c.Lab.Nodes < 4 {
		errs = append(errs, fmt.Errorf("%d nodes: want 4 at least, the pods' two, the gateway and an heir", c.Lab.Nodes))
	}
	if c.Pods < 2 || c.Pods > 100 {
		errs = append(errs, fmt.Errorf("%d pods: want 2 to 100", c.Pods))
	} else if most := c.most(); c.Connections < c.Pods*len(Kinds) || c.Connections > most {
		errs = append(errs, fmt.Errorf("%d connections: want one of each kind in each pod at least, %d, and %d at most", c.Connections,
			c.Pods*len(Kinds), most))
	}
	if _, ok := families[c.Family]; !ok {
		errs = append(errs, fmt.Errorf("family %d: want 4 or 6", c.Family))
	}
	if c.Interval < tick {
		errs = append(errs, fmt.Errorf("interval %v: want %v at least", c.Interval, tick))
	}
	if c.Wait < 0 {
		errs = append(errs, fmt.Errorf("wait %v: want 0 or more", c.Wait))
	}
	return errors.Join(errs...)
}

// most returns how many connections have source ports.
func (c Config) most() int {
	if c.OwnPorts {
		return 65536 - firstPort
	}
	return c.Pods * (65536 - firstPort)
}

// objects are a pool of one address, which leaves out the nodes that are to be filled in, and the egress of the pods.
const objects = `{"apiVersion": "v1", "kind": "List", "items": [
{"apiVersion": "crd.antrea.io/v1beta1", "kind": "ExternalIPPool", "metadata": {"name": "connections"}, "spec": {
  "ipRanges": [{"start": "%[1]s", "end": "%[1]s"}],
  "nodeSelector": {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "NotIn", "values": [%[2]s]}]}}},
{"apiVersion": "crd.antrea.io/v1beta1", "kind": "Egress", "metadata": {"name": "connections"}, "spec": {
  "externalIPPool": "connections", "appliedTo": {"podSelector": {"matchLabels": {"app": "connections"}}}}}]}`

// stragglers is how long after the last message that counts an answer may come: far above the lab's round trip on a
// busy machine.
const stragglers = time.Second

// bench is one measurement.
type bench struct {
	Config
	lab     *lab.Lab
	gateway *gateway.Gateway
	pods    []string
	traffic *traffic
}

// ip returns the egress IP.
func (c Config) ip() netip.Addr { return families[c.Family].egress }

// Run makes a lab, establishes the connections, lets the fault happen, and removes the lab, also when ctx ends before.
// A packet of a connection with another source address than the egress IP is an error, beside the report. That
// connections broke is none: see Report.Require.
func Run(ctx context.Context, cfg Config) (*Report, error) { return run(ctx, cfg, (*bench).inject) }

func run(ctx context.Context, cfg Config, fault func(*bench, context.Context) error) (report *Report, err error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	// Two sockets for each of two kinds, one for each of two more; ICMP has one in a pod. The lab and its clients are
	// few.
	if err := allowFiles(uint64(6*cfg.Connections/len(Kinds) + 1000)); err != nil {
		return nil, err
	}
	b := &bench{Config: cfg}
	if b.lab, err = lab.Up(ctx, cfg.Lab); err != nil {
		return nil, err
	}
	defer b.lab.DownAfter(ctx, &err)
	if b.gateway, err = gateway.Open(b.lab, b.ip()); err != nil {
		return nil, err
	}
	defer b.gateway.Close()
	if err := b.prepare(ctx); err != nil {
		return nil, err
	}
	return b.measure(ctx, fault)
}

// allowFiles lets this process have so many files open.
func allowFiles(n uint64) error {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("reading the limit of open files: %w", err)
	}
	if limit.Cur >= n {
		return nil
	}
	want := unix.Rlimit{Cur: n, Max: max(n, limit.Max)}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &want); err != nil {
		return fmt.Errorf("raising the limit of open files from %d to %d: %w", limit.Max, n, err)
	}
	return nil
}

// prepare makes egress and pods, and waits until the pods leave with the egress IP.
func (b *bench) prepare(ctx context.Context) error {
	homes := []string{lab.NodeName(b.Lab.Nodes - 1), lab.NodeName(b.Lab.Nodes)}
	left := fmt.Sprintf("%q, %q", homes[0], homes[1])
	if b.Fault == gateway.Move || b.Fault == gateway.Moves {
		left = `""` // no node
	}
	if err := gateway.Apply(ctx, b.lab, fmt.Sprintf(objects, b.ip(), left)); err != nil {
		return err
	}
	for i := range b.Pods {
		name := fmt.Sprintf("connections/pod-%d", i+1)
		if _, err := b.lab.Pod(ctx, lab.PodConfig{Name: name, Node: homes[i%2], Labels: map[string]string{"app": "connections"}}); err != nil {
			return err
		}
		b.pods = append(b.pods, name)
	}
	if _, err := b.gateway.Owner(ctx, ""); err != nil {
		return err
	}
	for _, pod := range b.pods {
		if err := gateway.Leaves(ctx, b.lab, pod, b.ip()); err != nil {
			return err
		}
	}
	if b.Fault != gateway.PowerOff && b.Fault != gateway.Kill {
		return nil // nobody has to find out by the gossip
	}
	return gateway.Sleep(ctx, gateway.Joining)
}

// measure establishes the connections, lets the fault happen, and asks who is alive.
func (b *bench) measure(ctx context.Context, fault func(*bench, context.Context) error) (*Report, error) {
	resets, err := b.lab.Sniff(ctx, "resets")
	if err != nil {
		return nil, err
	}
	if b.traffic, err = newTraffic(b.Config, b.lab, b.pods); err == nil {
		err = b.establish(ctx)
	}
	r := &Report{Fault: b.Fault}
	if err == nil {
		err = b.fail(ctx, r, fault)
	}
	var since time.Duration
	if err == nil {
		err = gateway.Sleep(ctx, b.Wait)
		since = b.traffic.now()
	}
	if err == nil {
		err = gateway.Sleep(ctx, 2*b.Interval+stragglers)
	}
	if err == nil {
		b.sumUp(r, since, resets)
	}
	b.traffic.stop()
	if err := errors.Join(err, resets.Stop()); err != nil {
		return nil, err
	}
	if len(b.traffic.strange) > 0 {
		return r, fmt.Errorf("the outside host saw packets of other sources than %s: %v", b.ip(), b.traffic.strange)
	}
	return r, nil
}

// establish opens the connections and waits until all are established, or do not become so.
func (b *bench) establish(ctx context.Context) error {
	if err := b.traffic.open(); err != nil {
		return err
	}
	for deadline := time.Now().Add(5*b.Interval + 5*time.Second); time.Now().Before(deadline); {
		if err := gateway.Sleep(ctx, max(b.Interval, 100*time.Millisecond)); err != nil {
			return err
		}
		if b.established() == len(b.traffic.connections) {
			break
		}
	}
	b.Log.Info("connections are established", "established", b.established(), "of", len(b.traffic.connections),
		"dur", b.traffic.now().Round(time.Millisecond))
	return gateway.Sleep(ctx, 2*b.Interval)
}

func (b *bench) established() (n int) {
	for _, c := range b.traffic.connections {
		if c.result("", 0).Established {
			n++
		}
	}
	return n
}

// fail lets the fault happen, and returns when it is over.
func (b *bench) fail(ctx context.Context, r *Report, fault func(*bench, context.Context) error) (err error) {
	if r.From, err = b.gateway.Owner(ctx, ""); err != nil {
		return err
	}
	if err := fault(b, ctx); err != nil {
		return err
	}
	if r.To, err = b.gateway.Owner(ctx, ""); err != nil {
		return err
	}
	r.Took = b.traffic.now() - time.Duration(b.traffic.fault.Load())
	b.Log.Info("the fault has happened", "fault", b.Fault, "from", r.From, "to", r.To, "dur", r.Took.Round(time.Millisecond))
	return nil
}

// begins tells that the fault begins now. It is called once.
func (b *bench) begins() { b.traffic.fault.Store(int64(b.traffic.now())) }

// inject lets the fault of the configuration happen to the gateway, and waits for the next one where there has to be
// one.
func (b *bench) inject(ctx context.Context) error {
	owner, err := b.gateway.Owner(ctx, "")
	if err != nil {
		return err
	}
	var nodes []string
	for i := range b.Lab.Nodes {
		nodes = append(nodes, lab.NodeName(i+1))
	}
	f, err := b.gateway.Fault(b.Fault, owner, nodes)
	if err != nil {
		return err
	}
	if b.Fault != gateway.PowerOff {
		b.begins()
	}
	if err := f.Inject(ctx); err != nil {
		return err
	}
	if b.Fault == gateway.PowerOff {
		b.begins() // not before, for it takes the lab some hundredths of a second, in which messages still get through
	}
	if f.NewOwner {
		_, err = b.gateway.Owner(ctx, owner)
	}
	if b.Fault == gateway.Kill {
		// as a kubelet does in the end; what the agent does then is part of the fault
		err = errors.Join(err, f.Mend(ctx))
	}
	return err
}

// sumUp fills the report in.
func (b *bench) sumUp(r *Report, since time.Duration, resets *lab.Sniffer) {
	r.Resets, r.Strays = map[Kind]int{}, map[Kind]int{}
	known := map[Kind]map[netip.AddrPort]bool{TCP: {}, Push: {}}
	for _, c := range b.traffic.connections {
		r.Results = append(r.Results, c.result(b.pods[c.pod], since))
		if known[c.kind] != nil {
			known[c.kind][c.source] = true
		}
	}
	for _, p := range resets.Packets() {
		for kind, sources := range known {
			peer := netip.AddrPortFrom(p.Dst, p.DstPort)
			if p.DstPort == serverPorts[kind] {
				peer = netip.AddrPortFrom(p.Src, p.SrcPort)
			} else if p.SrcPort != serverPorts[kind] {
				continue
			}
			r.Resets[kind]++
			if !sources[peer] {
				sources[peer] = true // each counts once
				r.Strays[kind]++
			}
		}
	}
}
