package failover

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/integration/gateway"
	"github.com/egret-project/egret/integration/lab"
)

// DeathsConfig says for how long to look at how many nodes, each of which holds an egress IP.
type DeathsConfig struct {
	Lab lab.Config
	For time.Duration // a second at least
}

// Validate reports every fault of the configuration.
func (c DeathsConfig) Validate() error {
	var errs []error
	if c.For < time.Second {
		errs = append(errs, fmt.Errorf("for %v: want 1s at least", c.For))
	}
	if c.Lab.Nodes < 2 || c.Lab.Nodes > 50 {
		errs = append(errs, fmt.Errorf("%d nodes: want 2 to 50", c.Lab.Nodes))
	}
	return errors.Join(errs...)
}

// Deaths is how often nodes that lived were taken for dead.
type Deaths struct {
	Nodes      int
	For        time.Duration
	Suspicions int     // written by a peer that had heard so by the gossip
	Moved      int     // egress IPs that another node took
	Load       float64 // of the machine: the mean of its load averages over a minute
	Probe      lab.ProbeResult
}

// String is the line that the command prints.
func (d Deaths) String() string {
	return fmt.Sprintf("%d nodes, %v, mean load %.1f: %d times a node that lived was suspected, %d egress IPs moved; of %d datagrams %d were lost, the longest gap was %v",
		d.Nodes, d.For, d.Load, d.Suspicions, d.Moved, d.Probe.Sent, d.Probe.Lost, d.Probe.LongestGap.Round(time.Millisecond))
}

// WriteCSV writes a header and a line.
func (d Deaths) WriteCSV(w io.Writer) error {
	_, err := fmt.Fprintf(w, "nodes,seconds,load,suspicions,moved,sent,lost,gap_ms\n%d,%.0f,%.1f,%d,%d,%d,%d,%d\n",
		d.Nodes, d.For.Seconds(), d.Load, d.Suspicions, d.Moved, d.Probe.Sent, d.Probe.Lost, d.Probe.LongestGap.Milliseconds())
	return err
}

// RunDeaths makes a lab in which every node holds an egress IP, lets nothing happen, and removes the lab, also when ctx
// ends before. A packet with another source than the egress IP is an error.
func RunDeaths(ctx context.Context, cfg DeathsConfig) (d Deaths, err error) {
	if err := cfg.Validate(); err != nil {
		return Deaths{}, err
	}
	l, err := lab.Up(ctx, cfg.Lab)
	if err != nil {
		return Deaths{}, err
	}
	defer l.DownAfter(ctx, &err)
	h, err := hold(ctx, l, cfg.Lab)
	if err != nil {
		return Deaths{}, err
	}
	defer h.close()
	return h.look(ctx, cfg.For)
}

// holding is a lab in which every node holds an egress IP.
type holding struct {
	bench
	etcd   *clientv3.Client
	owners map[string]string // by the key of the IP, at revision
	at     int64
}

// hold makes the egresses in a lab. Who calls it calls close.
func hold(ctx context.Context, l *lab.Lab, cfg lab.Config) (h *holding, err error) {
	// every node is a candidate, as for moves
	h = &holding{bench: bench{Config: Config{Lab: cfg, Fault: gateway.Move}, lab: l}}
	defer func() {
		if err != nil {
			h.close()
		}
	}()
	if h.gateway, err = gateway.Open(l, ip); err != nil {
		return nil, err
	}
	if h.etcd, err = l.DialEtcd(); err != nil {
		return nil, err
	}
	if err := h.prepare(ctx); err != nil {
		return nil, err
	}
	if err := gateway.Apply(ctx, l, others(cfg.Nodes)); err != nil {
		return nil, err
	}
	return h, h.allOwned(ctx)
}

func (h *holding) close() {
	if h.gateway != nil {
		h.gateway.Close()
	}
	if h.etcd != nil {
		h.etcd.Close()
	}
}

// others are an egress for each node but one, with a pool of their own.
func others(nodes int) string {
	items := []string{fmt.Sprintf(`{"apiVersion": "crd.antrea.io/v1beta1", "kind": "ExternalIPPool", "metadata": {"name": "others"}, "spec": {
  "ipRanges": [{"start": "10.10.0.12", "end": "10.10.0.%d"}], "nodeSelector": {}}}`, 10+nodes)}
	for i := 2; i <= nodes; i++ {
		items = append(items, fmt.Sprintf(`{"apiVersion": "crd.antrea.io/v1beta1", "kind": "Egress", "metadata": {"name": "other-%d"}, "spec": {
  "externalIPPool": "others", "appliedTo": {"podSelector": {"matchLabels": {"app": "none"}}}}}`, i))
	}
	return `{"apiVersion": "v1", "kind": "List", "items": [` + strings.Join(items, ",\n") + "]}"
}

const suspicions, ownersOf = "/egret/suspicions/", "/egret/owners/"

// allOwned waits until all IPs have owners, a minute at most.
func (h *holding) allOwned(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, time.Minute, errors.New("not all egress IPs had owners within a minute"))
	defer cancel()
	for {
		r, err := h.etcd.Get(ctx, ownersOf, clientv3.WithPrefix())
		if err != nil {
			return fmt.Errorf("reading owners: %w", err)
		}
		if len(r.Kvs) == h.Lab.Nodes {
			h.owners, h.at = map[string]string{}, r.Header.Revision
			for _, kv := range r.Kvs {
				if h.owners[string(kv.Key)], err = ownerOf(kv.Value); err != nil {
					return err
				}
			}
			return nil
		}
		if err := gateway.Sleep(ctx, 100*time.Millisecond); err != nil {
			return err
		}
	}
}

func ownerOf(value []byte) (string, error) {
	var o egress.Owner
	if err := json.Unmarshal(value, &o); err != nil {
		return "", fmt.Errorf("reading an owner: %w", err)
	}
	return o.Node, nil
}

// look counts what is written of suspicions and owners under a probe, since all IPs had owners.
func (h *holding) look(ctx context.Context, lasting time.Duration) (Deaths, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	d := Deaths{Nodes: h.Lab.Nodes, For: lasting}
	type probe struct {
		lab.ProbeResult
		err error
	}
	probed := make(chan probe, 1)
	go func() {
		r, err := h.lab.Probe(ctx, pod, 10*time.Millisecond, lasting)
		probed <- probe{r, err}
	}()
	from := clientv3.WithRev(h.at + 1)
	suspected := h.etcd.Watch(ctx, suspicions, clientv3.WithPrefix(), from)
	moved := h.etcd.Watch(ctx, ownersOf, clientv3.WithPrefix(), from)
	var loads loads
	tick := time.NewTicker(10 * time.Second)
	defer tick.Stop()
	for {
		err := loads.sample()
		if err != nil {
			return d, err
		}
		select {
		case <-tick.C:
			continue
		case r := <-suspected:
			if err = r.Err(); err != nil {
				err = fmt.Errorf("watching suspicions: %w", err)
			}
			for _, e := range r.Events {
				if e.Type == mvccpb.PUT {
					d.Suspicions++
				}
			}
		case r := <-moved:
			var n int
			n, err = h.moves(r)
			d.Moved += n
		case p := <-probed:
			d.Probe, d.Load, err = p.ProbeResult, loads.mean(), p.err
			if err == nil && (len(d.Probe.Sources) != 1 || d.Probe.Sources[ip] == 0) {
				err = fmt.Errorf("the outside host saw the sources %v, want %s only", d.Probe.Sources, ip)
			}
			return d, err
		}
		if err != nil {
			return d, err
		}
	}
}

// moves returns how many IPs have another owner than before.
func (h *holding) moves(r clientv3.WatchResponse) (n int, err error) {
	if err := r.Err(); err != nil {
		return 0, fmt.Errorf("watching owners: %w", err)
	}
	for _, e := range r.Events {
		if e.Type != mvccpb.PUT {
			continue
		}
		node, err := ownerOf(e.Kv.Value)
		if err != nil {
			return n, err
		}
		if key := string(e.Kv.Key); h.owners[key] != node {
			h.owners[key] = node
			n++
		}
	}
	return n, nil
}

// loads are load averages of the machine over a minute.
type loads []float64

func (l *loads) sample() error {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return err
	}
	var load float64
	if _, err := fmt.Sscan(string(b), &load); err != nil {
		return fmt.Errorf("reading the load average: %w", err)
	}
	*l = append(*l, load)
	return nil
}

func (l loads) mean() (mean float64) {
	for _, load := range l {
		mean += load / float64(len(l))
	}
	return mean
}
