package scale

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sys/unix"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/egret-project/egret/integration/lab"
	"github.com/egret-project/egret/store"
)

// Config says what to measure.
type Config struct {
	Lab     lab.Config
	Cluster Cluster
	Rest    time.Duration // for how long etcd is watched at rest, and again under events
	Events  int           // of pods, a second; every fourth is of a pod of node 1
	Rollout time.Duration // for how long agents are restarted, if not all are before
	AtOnce  int           // how many agents are restarted at a time
	Log     *slog.Logger  // a line a step; nil: none
}

// Validate reports every fault of the configuration.
func (c Config) Validate() error {
	var errs []error
	fault := func(format string, a ...any) { errs = append(errs, fmt.Errorf(format, a...)) }
	k := c.Cluster
	if k.Gateways < 3 || k.Gateways > 98 {
		fault("%d gateways: want 3 to 98", k.Gateways)
	}
	if k.Nodes < k.Gateways || k.Nodes > 65535 {
		fault("%d nodes: want as many as gateways, %d, and 65535 at most", k.Nodes, k.Gateways)
	}
	if k.Nodes%7919 == 0 {
		fault("%d nodes: want no multiple of 7919, by which pods are spread", k.Nodes)
	}
	if k.TakeOver < 2 || k.TakeOver > 254 || k.TakeOver/2 >= k.Egresses {
		fault("%d IPs to take over: want 2 to 254, and less than all of %d egresses", k.TakeOver, k.Egresses)
	}
	if k.Egresses > 60000 {
		fault("%d egresses: want 60000 at most", k.Egresses)
	}
	if k.Pods < 2*k.Nodes || k.Pods > 50*k.Nodes {
		fault("%d pods: want 2 to 50 a node", k.Pods)
	}
	if c.Rest < time.Second || c.Events < 1 || c.AtOnce < 1 || c.Rollout < 0 {
		fault("rest %v, %d events, %d agents at once, rollout %v: want 1s, 1, 1 and 0s at least", c.Rest, c.Events, c.AtOnce, c.Rollout)
	}
	return errors.Join(errs...)
}

// Of returns the same for another number of nodes: gateways, egresses and pods in proportion, what is taken over as it
// is.
func (c Config) Of(nodes int) Config {
	k := &c.Cluster
	part := func(n int) int { return n * nodes / c.Cluster.Nodes }
	k.Gateways, k.Pods = max(3, part(k.Gateways)), part(k.Pods)
	k.Egresses = max(part(k.Egresses), k.pairs()+20)
	k.Nodes = nodes
	return c
}

type bench struct {
	Config
	lab   *lab.Lab
	core  *kubernetes.Clientset
	etcd  *clientv3.Client
	fleet *exec.Cmd
	in    *json.Encoder
	out   *json.Decoder
	pipe  io.Closer
	pids  map[string]int
	node1 *kernel
	apps  map[int]int // of pods that were given another
	r     Result
}

// Run makes a cluster, measures, and removes it, also when ctx ends before. An error comes with what was measured until
// then.
func Run(ctx context.Context, cfg Config) (r Result, err error) {
	if err := cfg.Validate(); err != nil {
		return Result{}, err
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	cfg.Lab.Nodes, cfg.Lab.LeaseTTL, cfg.Lab.NoWebhook = 1, leaseTTL, true
	b := &bench{Config: cfg, pids: map[string]int{}, apps: map[int]int{}, r: Result{Cluster: cfg.Cluster}}
	if b.lab, err = lab.Up(ctx, cfg.Lab); err != nil {
		return Result{}, err
	}
	defer b.lab.DownAfter(ctx, &err)
	defer b.close()
	for _, step := range []struct {
		name string
		do   func(context.Context) error
	}{
		{"opening", b.open}, {"loading", b.load}, {"syncing", b.sync}, {"joining", b.join}, {"resting", b.rest}, {"changing pods", b.change},
		{"taking over", b.takeOver}, {"rolling out", b.rollout},
	} {
		began := time.Now()
		if err := step.do(ctx); err != nil {
			return b.r, fmt.Errorf("%s: %w", step.name, err)
		}
		b.Log.Info(step.name, "nodes", cfg.Cluster.Nodes, "dur", time.Since(began).Round(10*time.Millisecond))
	}
	return b.r, b.lab.Panics()
}

// open connects with what there is, stops crdsync and the agent, and starts the fleet.
func (b *bench) open(ctx context.Context) error {
	if err := errors.Join(b.lab.Stop(ctx, "agent", lab.NodeName(1)), b.lab.Stop(ctx, "crdsync", "")); err != nil {
		return err
	}
	kube, err := clientcmd.BuildConfigFromFlags("", b.lab.Kubeconfig())
	if err != nil {
		return err
	}
	kube.QPS = -1 // no limit: the server is ours
	if b.core, err = kubernetes.NewForConfig(kube); err != nil {
		return err
	}
	if b.etcd, err = b.lab.DialEtcd(); err != nil {
		return err
	}
	if err := b.lab.In("outside", "", silence); err != nil {
		return err
	}
	if err := b.lab.In("node", lab.NodeName(1), func() (err error) { b.node1, err = openKernel(); return err }); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if b.fleet, err = b.lab.Command(ctx, "control", "", self, helperName); err != nil {
		return err
	}
	b.fleet.Stderr = os.Stderr
	in, err1 := b.fleet.StdinPipe()
	out, err2 := b.fleet.StdoutPipe()
	key, err3 := os.ReadFile(b.lab.GossipKeyFile())
	if err := errors.Join(err1, err2, err3, b.fleet.Start()); err != nil {
		return fmt.Errorf("starting the fleet: %w", err)
	}
	b.in, b.out, b.pipe = json.NewEncoder(in), json.NewDecoder(out), in
	if _, err := base64.StdEncoding.DecodeString(string(key)); err != nil {
		return fmt.Errorf("reading the key of the gossip: %w", err)
	}
	return b.in.Encode(fleetConfig{
		Cluster: b.Cluster, Endpoints: strings.Split(b.lab.AgentEndpoints(), ","), Kube: b.lab.KubeEtcdEndpoint(), Key: string(key),
	})
}

// silence has the router drop what is sent to nodes that do not gossip, rather than say that it knows no way.
func silence() error {
	dst := silent
	return netlink.RouteAdd(&netlink.Route{Type: unix.RTN_BLACKHOLE, Dst: &net.IPNet{IP: dst.Addr().AsSlice(), Mask: net.CIDRMask(dst.Bits(), 32)}})
}

func (b *bench) close() {
	if b.pipe != nil {
		_ = b.pipe.Close() // ends the fleet
		_ = b.fleet.Wait() // what was wrong it has said
	}
	if b.etcd != nil {
		_ = b.etcd.Close() // it says no more than that it was closed
	}
}

// ask has the fleet do something.
func (b *bench) ask(r request) (reply, error) {
	if err := b.in.Encode(r); err != nil {
		return reply{}, fmt.Errorf("asking the fleet to %s: %w", r.Do, err)
	}
	var a reply
	if err := b.out.Decode(&a); err != nil {
		return a, fmt.Errorf("waiting for the fleet to %s: %w", r.Do, err)
	}
	if a.Err != "" {
		return a, fmt.Errorf("the fleet, asked to %s: %s", r.Do, a.Err)
	}
	return a, nil
}

// load writes the objects.
func (b *bench) load(ctx context.Context) error {
	label := fmt.Appendf(nil, `{"metadata": {"labels": {"%s": "%s"}}}`, poolLabel, pairPool)
	if _, err := b.core.CoreV1().Nodes().Patch(ctx, lab.NodeName(1), types.MergePatchType, label, metav1.PatchOptions{}); err != nil {
		return err
	}
	_, err := b.ask(request{Do: "load"})
	return err
}

// sync measures how long crdsync takes from its start until etcd has all that there is, and again when etcd has it
// already.
func (b *bench) sync(ctx context.Context) error {
	began := time.Now()
	if err := b.lab.Start(ctx, "crdsync", ""); err != nil {
		return err
	}
	if err := b.until(ctx, 5*time.Minute, store.MembersByNode, b.Cluster.members()); err != nil {
		return err
	}
	if err := b.until(ctx, 3*time.Minute, store.AllocationPrefix, 2*b.Cluster.Egresses); err != nil {
		return err
	}
	b.r.add(syncEmpty, time.Since(began).Seconds())
	if err := b.lab.Stop(ctx, "crdsync", ""); err != nil {
		return err
	}
	pod := b.Cluster.podOf(2, 0)
	app := b.other(pod, 0)
	if err := b.relabel(ctx, pod, app); err != nil {
		return err
	}
	began = time.Now()
	if err := b.lab.Start(ctx, "crdsync", ""); err != nil {
		return err
	}
	if err := b.written(ctx, 3*time.Minute, pod, app); err != nil {
		return err
	}
	b.r.add(syncAgain, time.Since(began).Seconds())
	return nil
}

// find notes the numbers of the lab's processes.
func (b *bench) find() (err error) {
	for name, process := range map[string]string{"etcd": "etcd", "crdsync": "crdsync", "agent": "agent-" + lab.NodeName(1)} {
		if b.pids[name], err = b.lab.PID(process); err != nil {
			return err
		}
	}
	return nil
}

// until waits until etcd has so many records below a prefix.
func (b *bench) until(ctx context.Context, limit time.Duration, prefix string, want int) error {
	var have int64
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); {
		r, err := b.etcd.Get(ctx, store.DefaultPrefix+prefix, clientv3.WithPrefix(), clientv3.WithCountOnly())
		if err != nil {
			return fmt.Errorf("waiting for %d records %s: %w", want, prefix, err)
		}
		if have = r.Count; have >= int64(want) {
			return nil
		}
		if !sleep(ctx, 100*time.Millisecond) {
			return context.Cause(ctx)
		}
	}
	return fmt.Errorf("%d records %s after %v, want %d", have, prefix, limit, want)
}

// written waits until etcd has the record of an app of a pod.
func (b *bench) written(ctx context.Context, limit time.Duration, pod, app int) error {
	key := store.DefaultPrefix + store.MembersByNodeKey(lab.NodeName(b.Cluster.node(pod)), b.Cluster.egress(pod, app))
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); {
		r, err := b.etcd.Get(ctx, key)
		if err != nil {
			return err
		}
		if len(r.Kvs) == 1 && strings.Contains(string(r.Kvs[0].Value), b.Cluster.pod(pod)) {
			return nil
		}
		if !sleep(ctx, 10*time.Millisecond) {
			return context.Cause(ctx)
		}
	}
	return fmt.Errorf("pod %s is not in %s after %v", b.Cluster.pod(pod), key, limit)
}

// join lets the fleet join, and then the agent of node 1.
func (b *bench) join(ctx context.Context) error {
	a, err := b.ask(request{Do: "join"})
	if err != nil {
		return err
	}
	b.r.add(fleetJoin, a.Took.Seconds())
	b.Log.Info("the fleet joined", "steps", a.Steps)
	began := time.Now()
	if err := b.lab.Start(ctx, "agent", lab.NodeName(1)); err != nil {
		return err
	}
	for deadline := began.Add(2 * time.Minute); ; {
		r, err := b.etcd.Get(ctx, store.DefaultPrefix+store.AgentKey(lab.NodeName(1)))
		if err != nil {
			return err
		}
		if len(r.Kvs) == 1 && strings.Contains(string(r.Kvs[0].Value), `"ready":true`) {
			break
		}
		if time.Now().After(deadline) {
			return errors.New("the agent of node-1 is not ready after 2m0s")
		}
		if !sleep(ctx, 20*time.Millisecond) {
			return context.Cause(ctx)
		}
	}
	b.r.add(agentReady, time.Since(began).Seconds())
	b.pids["fleet"] = b.fleet.Process.Pid
	return b.find()
}
