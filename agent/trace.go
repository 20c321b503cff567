package agent

import (
	"context"
	"errors"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/egret-project/egret/conntrack"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/nft"
	"github.com/egret-project/egret/plan"
	"github.com/egret-project/egret/routing"
	"github.com/egret-project/egret/vlan"
)

// KernelPage is where the agent is asked what its kernel has for a pod and an egress IP, with the parameters of
// egress.KernelQuestion. It answers with an egress.Kernel, changes nothing in the kernel, asks the next hops by ARP or
// NDP, and is for those who may trace: it shows them addresses of pods.
const KernelPage = "/kernel"

// A question looks again when the agent writes to the kernel meanwhile, for lookTime in all.
const (
	lookTime  = time.Second
	lookAgain = 20 * time.Millisecond
)

// errProgramming says that nothing can be told of the kernel: what it holds and what it is to hold were not of one
// moment.
var errProgramming = errors.New("the agent is programming its kernel, or has not begun to: ask again")

// programmed is what the kernel was last made equal to, for those who look at it from other goroutines than that of
// loop. Of them loop waits for at most one reading of the tables (nft.Tables.Observe).
type programmed struct {
	desired atomic.Pointer[plan.Desired] // nil: nothing yet, or it is being written
	writes  atomic.Uint64
}

// begin says that the kernel is about to be written to, and returns what says that it was, for what.
func (p *programmed) begin() (end func(*plan.Desired)) {
	p.desired.Store(nil)
	p.writes.Add(1)
	return p.desired.Store
}

// differs returns what the kernel was last made equal to, and as lines what is not so: damages of the tables first,
// and then all that program would write.
func (k *kernel) differs() (d plan.Desired, lines []string, err error) {
	for end := time.Now().Add(lookTime); time.Now().Before(end); time.Sleep(lookAgain) {
		writes, want := k.programmed.writes.Load(), k.programmed.desired.Load()
		if want == nil {
			continue
		}
		if lines, err = k.compare(*want); k.programmed.writes.Load() == writes {
			return *want, lines, err
		}
	}
	return d, nil, errProgramming
}

// compare observes the kernel, and returns what is not as d asks for. It writes nothing.
func (k *kernel) compare(d plan.Desired) ([]string, error) {
	var have observed
	var err1, err2, err3 error
	have.links, err1 = k.links.Observe()
	have.routes, err2 = k.router.Observe()
	have.tables, err3 = k.tables.Observe()
	if err := errors.Join(in("addresses", err1), in("routes", err2), in("nftables", err3)); err != nil {
		return nil, err
	}
	rules := nft.Diff(have.tables, k.tablesState(d.NFT, have))
	lines := slices.Clone(rules.Repairs)
	for _, changes := range []string{vlan.Diff(have.links, d.VLAN).String(), routing.Diff(have.routes, d.Routing).String(), rules.String()} {
		for line := range strings.Lines(changes) {
			lines = append(lines, strings.TrimRight(line, "\n"))
		}
	}
	return lines, nil
}

// kernelPage is KernelPage.
func (a *answerer) kernelPage(w http.ResponseWriter, r *http.Request) {
	q, err := egress.ParseKernelQuestion(r.URL.Query())
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if !isOther(a.node, w, r) {
		a.one(w, func() (any, error) { return a.kernel(r.Context(), q) })
	}
}

// readKernelOf answers a question by the kernel.
func (a *agent) readKernelOf(ctx context.Context, q egress.KernelQuestion) (k egress.Kernel, err error) {
	d, differs, err := a.kernel.differs()
	if err != nil {
		return k, err
	}
	permits, err1 := a.tables.Permits()
	answering, err2 := a.tables.Answering()
	guarded, err3 := a.tables.Guarded()
	dropped, err4 := a.tables.Counters()
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		return k, err
	}
	k = kernelOf(d.NFT, q)
	k.Node, k.Watching = a.Node, a.view.Healthy()
	k.Differs, k.Differed = differs[:min(len(differs), egress.MaxDiffers)], len(differs)
	k.Permit, k.Answers = permits[q.IP].Seconds(), permits[q.IP] > 0 && answering[q.IP]
	if count := a.ports.counts()[q.IP]; count.block.First == k.First {
		k.PortsUsed = count.most
	}
	if ago, ok := guarded[q.ID]; ok {
		k.Guarded = ago.Round(time.Millisecond).Seconds()
	}
	k.Dropped = map[string]uint64{}
	for reason, n := range dropped {
		if n > 0 {
			k.Dropped[reason] = n
		}
	}
	if k.Path, err = a.pathOf(ctx, d, q); err != nil {
		k.Path.Unread = err.Error()
	}
	if k.PodID == 0 || k.PodID != q.ID {
		return k, nil // none of its connections is by this id
	}
	list, err := conntrack.Marked(q.ID.ConnMark())
	k.Connections = connectionsOf(q.Pod, list)
	if q.ToOne() && k.Ports > 0 {
		used := portsTo(q, k, list)
		k.UsedTo = &used
	}
	return k, err
}

// kernelOf returns what of the tables is about the pod and the egress IP.
func kernelOf(s nft.State, q egress.KernelQuestion) egress.Kernel {
	k := egress.Kernel{PodID: s.Pods[q.Pod], Gateway: s.Gateways[q.ID], Guarded: -1}
	_, k.Steered = s.NextHops[q.ID]
	if b, ok := s.Blocks[q.ID]; ok {
		k.First, k.Ports = b.First, b.Size
	}
	k.Excepted = exception(s, q.To)
	return k
}

// exception returns the range to which no egress applies that has an address; the zero Prefix: none has it.
func exception(s nft.State, to netip.Addr) netip.Prefix {
	if i := slices.IndexFunc(s.Except, func(p netip.Prefix) bool { return p.Contains(to) }); i >= 0 {
		return s.Except[i]
	}
	return netip.Prefix{}
}

// connectionsOf counts the connections of a pod.
func connectionsOf(pod netip.Addr, list []conntrack.Connection) (n int) {
	for _, c := range list {
		if c.Source == pod {
			n++
		}
	}
	return n
}

// portsTo counts the ports of the block of k that connections have to the destination of a question, of all pods of the
// node. One that has ended has its port until the kernel forgets it, or needs the port.
func portsTo(q egress.KernelQuestion, k egress.Kernel, list []conntrack.Connection) int {
	used := map[uint16]bool{}
	for _, c := range list {
		of := c.Protocol == q.Protocol && c.Destination == q.To && (q.Port == 0 || c.DestinationPort == q.Port)
		if of && c.Translated == q.IP && int(c.Port) >= int(k.First) && int(c.Port) < int(k.First)+k.Ports {
			used[c.Port] = true
		}
	}
	return len(used)
}
