package page

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/egret-project/egret/connlimit"
	"github.com/egret-project/egret/egress"
)

// What the traffic that is shown may cost, of the page and of the agents.
const (
	// trafficEvery is for how long an agent's answer is taken for all who look: a gateway is asked once in that time at
	// most.
	trafficEvery = 4 * time.Second
	// trafficRest is for how long an agent that did not answer is left alone.
	trafficRest = 20 * time.Second
	// trafficPatience is how long an agent may take, and the end of who asked be put off at most.
	trafficPatience = 3 * time.Second
	// maxAsked is how many agents are asked at a time, for all who look, and as many beside these that did not answer
	// the last time; trafficPace is how long one counts as asked at least: each is a handshake of TLS, some 2 ms of a
	// processor.
	maxAsked    = 16
	trafficPace = 100 * time.Millisecond
	// maxTraffic is how many egress IPs there are in a question: more than the rows of a screen have.
	maxTraffic = 200
	// trafficKept is for how long an answer is kept that nobody asked for again.
	trafficKept = time.Minute
)

// AskTraffic asks the agent of a node, which is at one of these addresses, what has passed by its egress IPs. Its error
// is shown to who looks, who is no programmer.
type AskTraffic func(ctx context.Context, node string, addresses []netip.Addr) (egress.NodeTraffic, error)

// gateways are what agents said of the traffic of the egress IPs that they hold: those alone whose egresses somebody
// looks at are asked. Its methods are safe for concurrent use.
type gateways struct {
	ask AskTraffic
	// maxAsked each: who is asked. Those that did not answer the last time wait for each other alone, so that the others
	// are asked however many are silent.
	slots, silent slots

	mu sync.Mutex // guards of, and the fields of each but asking
	of map[string]*gateway
}

type gateway struct {
	asking       chan struct{}      // capacity 1: it is asked
	used         time.Time          // when somebody wanted to know last
	due          time.Time          // when it may be asked again
	last, before egress.NodeTraffic // answers; the zero NodeTraffic: none
	err          error              // why there is nothing new
}

func newGateways(ask AskTraffic) *gateways {
	return &gateways{ask: ask, slots: make(slots, maxAsked), silent: make(slots, maxAsked), of: map[string]*gateway{}}
}

// read returns the last two answers of a node's agent, which is asked where the last one is old.
func (g *gateways) read(ctx context.Context, node string, addresses []netip.Addr) (last, before egress.NodeTraffic, err error) {
	own, now := g.get(node)
	if !now {
		select {
		case own.asking <- struct{}{}:
		case <-ctx.Done():
			return last, before, fmt.Errorf("the agent of node %s is being asked, and has not answered yet", node)
		}
		if _, now = g.get(node); !now { // nobody else was faster
			err = g.askOne(ctx, own, node, addresses)
		}
		<-own.asking
	}
	if err != nil {
		return last, before, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	return own.last, own.before, own.err
}

// get returns what there is of a node, and whether that may be shown as it is. What nobody has asked for is forgotten.
func (g *gateways) get(node string) (own *gateway, now bool) {
	at := time.Now()
	g.mu.Lock()
	defer g.mu.Unlock()
	for name, other := range g.of {
		if at.Sub(other.used) > trafficKept && name != node {
			delete(g.of, name)
		}
	}
	if own = g.of[node]; own == nil {
		own = &gateway{asking: make(chan struct{}, 1)}
		g.of[node] = own
	}
	own.used = at
	return own, at.Before(own.due)
}

// askOne asks an agent, and notes what it said. An error: it was not asked.
func (g *gateways) askOne(ctx context.Context, own *gateway, node string, addresses []netip.Addr) error {
	g.mu.Lock()
	turns := g.slots
	if own.err != nil {
		turns = g.silent
	}
	g.mu.Unlock()
	leave, ok := turns.enter(ctx, trafficPace)
	if !ok {
		return fmt.Errorf("the agent of node %s was not asked yet: those of others come first, which are slow to answer", node)
	}
	defer leave()
	// Who has gone does not cut it off: others may be waiting for the answer.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), trafficPatience)
	defer cancel()
	answer, err := g.ask(ctx, node, addresses)
	if err == nil && len(answer.IPs) > egress.MaxTraffic {
		err = fmt.Errorf("the agent of node %s tells of %d IPs: %d are the most", node, len(answer.IPs), egress.MaxTraffic)
	}
	now := time.Now()
	g.mu.Lock()
	defer g.mu.Unlock()
	if err != nil {
		own.err = fmt.Errorf("%w; it is asked again within %v", err, trafficRest)
		own.due, own.last, own.before = now.Add(trafficRest), egress.NodeTraffic{}, egress.NodeTraffic{}
		return nil
	}
	own.err, own.due = nil, now.Add(trafficEvery)
	// else it is the reading of before, given to another one who asks, too
	if answer.Read != own.last.Read || answer.Read == 0 {
		own.before = own.last
	}
	own.last = answer
	return nil
}

// trafficRow is what is shown of an egress IP. Rates are there when there are two answers of a gateway that had it
// throughout.
type trafficRow struct {
	Gateway string `json:"gateway,omitempty"` // empty: nobody has it
	egress.Traffic
	Rated        bool    `json:"rated,omitempty"`
	SentRate     float64 `json:"sentRate,omitempty"` // bit/s
	ReceivedRate float64 `json:"receivedRate,omitempty"`
	Fault        string  `json:"fault,omitempty"` // why it is not known
}

// rowOf returns what is shown of an IP by two answers of its gateway. Of their times its clock tells: how long they
// took to come is not in the rate.
func rowOf(ip netip.Addr, node string, last, before egress.NodeTraffic, err error) trafficRow {
	row := trafficRow{Gateway: node}
	now, ok := last.IPs[ip]
	switch {
	case err != nil:
		row.Fault = err.Error()
		return row
	case !ok:
		row.Fault = "node " + node + " has not counted it yet: it has just got it, or has lost it"
		return row
	}
	row.Traffic = now
	then, ok := before.IPs[ip]
	seconds := (last.Read - before.Read).Seconds()
	// The kernel counts anew when an IP comes back to a node, and its clock begins anew when it boots.
	if ok && before.Read > 0 && seconds > 0 && now.SentBytes >= then.SentBytes && now.ReceivedBytes >= then.ReceivedBytes {
		row.Rated = true
		row.SentRate, row.ReceivedRate = 8*float64(now.SentBytes-then.SentBytes)/seconds, 8*float64(now.ReceivedBytes-then.ReceivedBytes)/seconds
	}
	return row
}

// traffic answers what passes by egress IPs, by what their gateways count. A client has one such question at a time,
// beside its others: agents may be slow.
func (p *Page) traffic(w http.ResponseWriter, r *http.Request) {
	if p.gateways == nil {
		http.Error(w, "agents are not asked for traffic here: --agents-port says how they are", http.StatusNotFound)
		return
	}
	ips, err := parseIPs(r.URL.Query().Get("ips"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	p.answer(w, r, &p.looks, func(ctx context.Context, now *shown) (any, error) {
		rows := make([]trafficRow, len(ips))
		var asked sync.WaitGroup
		for i, ip := range ips {
			node := now.whole.Owners[ip].Node
			if node == "" {
				rows[i].Fault = "no node has it"
				continue
			}
			asked.Go(func() {
				last, before, err := p.gateways.read(ctx, node, now.whole.Nodes[node].Addresses)
				rows[i] = rowOf(ip, node, last, before, err)
			})
		}
		asked.Wait()
		out := make(map[netip.Addr]trafficRow, len(ips))
		for i, ip := range ips {
			out[ip] = rows[i]
		}
		return out, nil
	})
}

// parseIPs reads addresses with commas between.
func parseIPs(text string) (ips []netip.Addr, err error) {
	const want = "ips: want IPv4 or IPv6 addresses with commas between"
	if text == "" || len(text) > 46*maxTraffic {
		return nil, errors.New(want)
	}
	for field := range strings.SplitSeq(text, ",") {
		ip, err := netip.ParseAddr(field)
		if err != nil || ip.Zone() != "" {
			return nil, errors.New(want)
		}
		if ips = append(ips, ip.Unmap()); len(ips) > maxTraffic {
			return nil, fmt.Errorf("ips: want %d at most", maxTraffic)
		}
	}
	return ips, nil
}

// client returns who asks: those that have no address are one.
func client(r *http.Request) netip.Prefix {
	from, _ := netip.ParseAddrPort(r.RemoteAddr)
	return connlimit.Client(from.Addr())
}
