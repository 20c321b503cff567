package datapath

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/egret-project/egret/integration/gateway"
	"github.com/egret-project/egret/integration/lab"
)

// Path is a way that a pod's packets take to the outside host.
type Path struct {
	Name, What string
	Base       string // the path that it is compared with; empty: it is one of those
	pod, node  string
	source     netip.Addr // that the outside host sees
}

// Paths are all paths. Egret runs on node-1 and node-2; node-3 and node-4 have never had it.
var Paths = []Path{
	{"masquerade", "no Egret on the node, the CNI's masquerade", "", "datapath/masquerade", "node-3", lab.NodeIP(3)},
	{"unselected", "a pod that no egress selects, beside Egret", "masquerade", "datapath/unselected", "node-1", lab.NodeIP(1)},
	{"own", "the pod's own node is its gateway", "masquerade", "datapath/own", "node-1", netip.MustParseAddr("10.10.0.11")},
	{"vxlan", "no Egret: VXLAN to another node, which masquerades", "", "datapath/vxlan", "node-3", lab.NodeIP(4)},
	{"remote", "another node is the gateway", "vxlan", "datapath/remote", "node-1", netip.MustParseAddr("10.10.0.12")},
}

// Config says what to measure.
type Config struct {
	Lab      lab.Config    // Nodes and Bare are set by Run
	Rounds   int           // in each, every path is measured once; 1 at least
	Duration time.Duration // of each of a path's four measurements; 100ms at least
}

// Validate reports every fault of the configuration.
func (c Config) Validate() error {
	var errs []error
	if c.Rounds < 1 {
		errs = append(errs, fmt.Errorf("%d rounds: want 1 at least", c.Rounds))
	}
	if c.Duration < 100*time.Millisecond {
		errs = append(errs, fmt.Errorf("duration %v: want 100ms at least", c.Duration))
	}
	return errors.Join(errs...)
}

// Result is what was measured of a path in a round.
type Result struct {
	Round  int // 1 and up
	Path   string
	Values [len(Columns)]float64 // as Columns has them
}

// Run makes a lab, measures, and removes the lab, also when ctx ends before. It calls done after each result. An error
// ends it, with the results until then.
func Run(ctx context.Context, cfg Config, done func(Result)) (results []Result, err error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg.Lab.Nodes, cfg.Lab.Bare = 4, true
	l, err := lab.Up(ctx, cfg.Lab)
	if err != nil {
		return nil, err
	}
	defer l.DownAfter(ctx, &err)
	if err := prepare(ctx, l); err != nil {
		return nil, err
	}
	stop, err := serve(l)
	if err != nil {
		return nil, err
	}
	defer stop()
	for round := range cfg.Rounds {
		// Neighbours in time are what is compared, and no path is always the first after a pause.
		order := slices.Concat(Paths[round%len(Paths):], Paths[:round%len(Paths)])
		values := map[string]*[len(Columns)]float64{}
		for _, p := range order {
			values[p.Name] = new([len(Columns)]float64)
		}
		for _, measure := range measurements {
			for _, p := range order {
				if err := measure(ctx, l, p.pod, cfg.Duration, values[p.Name]); err != nil {
					return results, fmt.Errorf("round %d, %s: %w", round+1, p.Name, err)
				}
			}
		}
		for _, p := range Paths {
			r := Result{round + 1, p.Name, *values[p.Name]}
			results = append(results, r)
			done(r)
		}
	}
	return results, nil
}

// objects are an egress for each of the two gateways.
const objects = `{"apiVersion": "v1", "kind": "List", "items": [%s]}`

const object = `
{"apiVersion": "crd.antrea.io/v1beta1", "kind": "ExternalIPPool", "metadata": {"name": "%[1]s"}, "spec": {
  "ipRanges": [{"start": "%[2]s", "end": "%[2]s"}], "nodeSelector": {"matchLabels": {"kubernetes.io/hostname": "%[3]s"}}}},
{"apiVersion": "crd.antrea.io/v1beta1", "kind": "Egress", "metadata": {"name": "%[1]s"}, "spec": {
  "externalIPPool": "%[1]s", "appliedTo": {"podSelector": {"matchLabels": {"app": "%[1]s"}}}}}`

// prepare starts Egret on its two nodes, makes pods and egresses, and waits until every pod leaves with the source of
// its path.
func prepare(ctx context.Context, l *lab.Lab) error {
	for _, p := range Paths {
		if _, err := l.Pod(ctx, lab.PodConfig{Name: p.pod, Node: p.node, Labels: map[string]string{"app": p.Name}}); err != nil {
			return err
		}
	}
	if err := tunnel(ctx, l); err != nil {
		return err
	}
	for _, node := range []string{"", "node-1", "node-2"} {
		what := "agent"
		if node == "" {
			what = "crdsync"
		}
		if err := l.Start(ctx, what, node); err != nil {
			return err
		}
	}
	list := fmt.Sprintf(objects, fmt.Sprintf(object, "own", "10.10.0.11", "node-1")+","+fmt.Sprintf(object, "remote", "10.10.0.12", "node-2"))
	if err := gateway.Apply(ctx, l, list); err != nil {
		return err
	}
	for _, p := range Paths {
		if err := gateway.Leaves(ctx, l, p.pod, p.source); err != nil {
			return err
		}
	}
	return nil
}

// tunnel is what an operator without Egret builds: the pod's node sends its packets by VXLAN to a node that
// masquerades, and the answers come back that way. The MSS is clamped both ways, as Egret does.
func tunnel(ctx context.Context, l *lab.Lab) error {
	ip, err := podIP(ctx, l, "datapath/vxlan")
	if err != nil {
		return err
	}
	run := func(node, commands string) (err error) {
		for line := range strings.Lines(commands) {
			if argv := strings.Fields(line); len(argv) > 0 && err == nil {
				_, err = l.Exec(ctx, "node", node, argv...)
			}
		}
		return err
	}
	const link = "ip link add vx0 type vxlan id 42 dstport 4789 dev eth0 local %s remote %s\nip link set vx0 mtu 1450 up\nip addr add 192.168.42.%d/30 dev vx0\n"
	const clamp = "nft add table inet clamp\nnft add chain inet clamp forward { type filter hook forward priority mangle ; }\n" +
		"nft add rule inet clamp forward tcp flags & (syn|rst) == syn tcp option maxseg size set rt mtu\n"
	return errors.Join(
		run("node-3", fmt.Sprintf(link, lab.NodeIP(3), lab.NodeIP(4), 1)+clamp+
			"nft insert rule inet cni postrouting oifname vx0 accept\n"+
			"ip route add default via 192.168.42.2 dev vx0 table 42\nip rule add from "+ip+" to 203.0.113.0/24 lookup 42 priority 42\n"),
		run("node-4", fmt.Sprintf(link, lab.NodeIP(4), lab.NodeIP(3), 2)+clamp+
			"ip route add "+ip+"/32 via 192.168.42.1 dev vx0\n"),
	)
}

func podIP(ctx context.Context, l *lab.Lab, pod string) (string, error) {
	namespace, name, _ := strings.Cut(pod, "/")
	out, err := l.Kubectl(ctx, "get", "pod", "-n", namespace, name, "-o", "jsonpath={.status.podIP}")
	if err != nil {
		return "", fmt.Errorf("reading the address of pod %s: %w", pod, err)
	}
	return string(out), nil
}
