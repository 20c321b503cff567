package operator

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/nft"
	"github.com/egret-project/egret/store"
)

// kernelPatience is how long a trace waits for agents. A node whose agent takes longer is told by the records.
const kernelPatience = 3 * time.Second

// recentDrop is how long ago, in seconds, a drop of the guard still says something of the next packet: a moment of
// them belongs to every take-over.
const recentDrop = 5

// adds adds a step: what it is of, what it means for the packet, and its text.
type adds = func(what string, f fault, format string, a ...any)

// kernels are what agents said of their kernels, for one way of a pod.
type kernels struct {
	said   map[string]egress.Kernel // by node
	silent map[string]error         // nodes that did not say; ErrNoWay: they are not reached from here
}

// asked reports whether all of the nodes said what their kernels have.
func (k kernels) asked(nodes ...string) bool {
	return !slices.ContainsFunc(nodes, func(n string) bool { _, ok := k.said[n]; return !ok })
}

// kernelsFor returns what asks the nodes of a way; nil: the records are all there is to go by.
type kernelsFor func(w store.Whole, q egress.KernelQuestion, home, gateway string) kernels

// noting returns ask, and has it note the nodes whose agents are not reached from here, those of pods first.
func (ask kernelsFor) noting(beyond *[]string) kernelsFor {
	if ask == nil {
		return nil
	}
	return func(w store.Whole, q egress.KernelQuestion, home, gateway string) kernels {
		k := ask(w, q, home, gateway)
		for _, node := range []string{home, gateway} {
			if errors.Is(k.silent[node], ErrNoWay) && !slices.Contains(*beyond, node) {
				*beyond = append(*beyond, node)
			}
		}
		return k
	}
}

// askKernels returns what asks agents, all at once, at the page where they tell of their kernels.
func askKernels(ctx context.Context, ask Ask, page string) kernelsFor {
	if ask == nil {
		return nil
	}
	return func(w store.Whole, q egress.KernelQuestion, home, gateway string) kernels {
		ctx, cancel := context.WithTimeout(ctx, kernelPatience)
		defer cancel()
		out := kernels{said: map[string]egress.Kernel{}, silent: map[string]error{}}
		nodes := []string{home, gateway}
		slices.Sort(nodes)
		var wg sync.WaitGroup
		var mu sync.Mutex // guards out
		for _, node := range slices.Compact(nodes) {
			if node == "" {
				continue
			}
			q := q
			switch {
			case node != home:
				q.Pod, q.Peer = netip.Addr{}, w.Nodes[home].Index
			case gateway != home:
				q.Peer = w.Nodes[gateway].Index
			}
			wg.Go(func() {
				var k egress.Kernel
				err := whileBusy(ctx, func() error { return ask(ctx, node, w.Nodes[node].Addresses, page, q.Query(), &k) })
				mu.Lock()
				defer mu.Unlock()
				if err == nil {
					out.said[node] = k
				} else {
					out.silent[node] = err
				}
			})
		}
		wg.Wait()
		return out
	}
}

// whileBusy asks an agent again for as long as it answers another question, or rests after one, until ctx ends.
func whileBusy(ctx context.Context, ask func() error) error {
	for {
		err := ask()
		if !errors.Is(err, errBusy) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// excepted adds the steps of a destination that the kernel of the pod's node excepts, and reports whether it does.
func (k kernels) excepted(w store.Whole, q Question, home string, step adds) bool {
	have := k.said[home]
	if !have.Excepted.IsValid() {
		return false
	}
	agentAt(w, home, step)
	step("kernel", passes, "%s is in %s, to which no egress applies on %s (--egress.exceptCIDRs or --cluster-cidrs of its agent)",
		q.destination(), have.Excepted, home)
	state(have, home, step)
	return true
}

// kernelBeside adds what the kernel of a pod's node tells of an address to which no egress applies.
func (k kernels) kernelBeside(w store.Whole, p podAt, step adds) {
	have, ok := k.said[p.node]
	switch {
	case !ok:
		k.unheard(p.node, step)
		return
	case have.PodID != 0 && !p.selected():
		step("kernel", doubts, "%s has %s as a pod of %s: it leaves with that", p.node, p.ip, ofID(w, have.PodID))
	case !p.selected():
		step("kernel", "", "%s has %s as no pod of an egress, either", p.node, p.ip)
	case have.Excepted.IsValid():
		step("kernel", "", "%s has the exception, too: %s", p.node, have.Excepted)
	}
	state(have, p.node, step)
}

// ofID names the egress IP of an id.
func ofID(w store.Whole, id egress.ID) string {
	for _, name := range slices.Sorted(maps.Keys(w.Egresses)) {
		for _, a := range w.Egresses[name].Addresses {
			if a.ID == id {
				return "egress IP " + a.IP.String()
			}
		}
	}
	return fmt.Sprintf("the egress IP of id %d", id)
}

// kernelHere adds the steps that the kernel of the pod's node tells.
func (k kernels) kernelHere(w store.Whole, q Question, pod netip.Addr, a egress.Address, home, gateway string, step adds) {
	have, ok := k.said[home]
	if !ok {
		k.unheard(home, step)
		return
	}
	_, moving := w.Moves[a.IP]
	switch {
	case have.PodID == 0:
		step("kernel", stops, "%s has %s as no pod of an egress: its connections leave by the CNI, or wait", home, pod)
	case have.PodID != a.ID:
		step("kernel", stops, "%s has %s as a pod of id %d, and not of %s, which is id %d", home, pod, have.PodID, a.IP, a.ID)
	case !have.Steered:
		step("kernel", stops, "%s drops what %s sends: it has no next hop for %s", home, pod, a.IP)
	case !moving && have.Gateway != gatewayIndex(w, home, gateway):
		step("kernel", stops, "%s sends to another gateway than %s: to the node of index %d (0: out by itself)", home, gateway, have.Gateway)
	default:
		// What is known of the destination that was asked for goes before what is of the busiest one.
		used, to := have.PortsUsed, "one destination"
		if have.UsedTo != nil {
			used, to = *have.UsedTo, q.destination()
		}
		ports := "no block of ports"
		if have.Ports > 0 {
			ports = fmt.Sprintf("%d of %d ports in use to %s", used, have.Ports, to)
		}
		step("kernel", "", "%s has the pod, and its next hop; %d connections, %s", home, have.Connections, ports)
		if n := q.protocol(pod); have.Ports > 0 && used >= have.Ports && (n == 0 || egress.HasPorts(n, pod)) {
			step("kernel", doubts, "all %d ports that %s has of %s are in use to %s: new connections there fail until some end, "+
				"or the node gets a larger block", have.Ports, home, a.IP, to)
		}
	}
	common(have, home, a, step)
}

// kernelThere adds the steps that the kernel of the gateway tells, which may be the pod's node.
func (k kernels) kernelThere(w store.Whole, a egress.Address, home, gateway string, step adds) {
	have, ok := k.said[gateway]
	if !ok {
		if gateway != home {
			k.unheard(gateway, step)
		}
		return
	}
	_, moving := w.Moves[a.IP]
	switch {
	case have.Permit <= 0:
		step("kernel", stops, "%s has no permit for %s: it neither sends with it nor answers for it", gateway, a.IP)
	case !have.Answers && a.Pool != "" && !moving:
		step("kernel", stops, "%s sends with %s, and does not answer for it: no reply comes back", gateway, a.IP)
	default:
		step("kernel", "", "%s has a permit for %s", gateway, a.IP)
	}
	if gateway != home {
		common(have, gateway, a, step)
	}
}

// unheard says that a node was asked and told nothing.
func (k kernels) unheard(node string, step adds) {
	if err := k.silent[node]; err != nil && !errors.Is(err, ErrNoWay) {
		step("kernel", "", "%s is told by the records alone: %v", node, err)
	}
}

// gatewayIndex is the index of the gateway, as the pod's node has it.
func gatewayIndex(w store.Whole, home, gateway string) int {
	if home == gateway {
		return 0
	}
	return w.Nodes[gateway].Index
}

// common adds what is told of any node on the way.
func common(have egress.Kernel, node string, a egress.Address, step adds) {
	state(have, node, step)
	if have.Guarded >= 0 && have.Guarded < recentDrop {
		step("kernel", doubts, "the guard of %s dropped a packet of %s %.1fs ago, which was about to leave with another source", node, a.IP, have.Guarded)
	}
}

// state adds what is told of a kernel as a whole.
func state(have egress.Kernel, node string, step adds) {
	if !have.Watching {
		step("kernel", doubts, "the agent of %s does not follow etcd at present: its kernel has what it was told before", node)
	}
	if have.Differed > 0 && len(have.Differs) > 0 {
		step("kernel", doubts, "the kernel of %s is not as its agent wants it, in %d places: %s", node, have.Differed, have.Differs[0])
	}
	var counters []string
	for _, reason := range slices.Sorted(maps.Keys(have.Dropped)) {
		if n := have.Dropped[reason]; n > 0 && reason != nft.CounterBandwidth { // which is told beside the limit
			counters = append(counters, fmt.Sprintf("%s %d", reason, n))
		}
	}
	if len(counters) > 0 {
		step("kernel", "", "%s has dropped packets, of any pod, since its tables were made: %s", node, strings.Join(counters, ", "))
	}
}

// limited adds what the gateway dropped above limits.
func (k kernels) limited(gateway string, step adds) {
	if n := k.said[gateway].Dropped[nft.CounterBandwidth]; n > 0 {
		step("limit", "", "%s has dropped %d packets above the limits of its egress IPs, all together, since its tables were made", gateway, n)
	}
}
