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
	"net/netip"
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

	"github.com/egret-project/egret/integration/cdf"
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

// Of returns the same for another number of nodes: gateways, egresses and pods in proportion, what is taken over as it is.
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

// Run makes a cluster, measures, and removes it, also when ctx ends before. An error comes with what was measured until then.
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

// sync measures how long crdsync takes from its start until etcd has all that there is, and again when etcd has it already.
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

// change changes the labels of pods, one after the other, so that they are another egress's. Of pods of node 1 it measures how long it takes until the
// kernel has it.
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
