package agent

import (
	"encoding/json"
	"errors"
	"math/rand/v2"
	"net/netip"
	"sync"
	"time"

	"github.com/egret-project/egret/gossip"
	"github.com/egret-project/egret/ownership"
	"github.com/egret-project/egret/plan"
	"github.com/egret-project/egret/store"
)

// driver drives the node's machine: it brings it what etcd and the peers say. What the machine asks for outside of
// reconcile, agent.step does.
type driver struct {
	machine *machine
	gossip  *gossip.Gossip // nil: off
	// Of capacity 1 each: etcd is to be asked for a yes, and the peers for promises while it does not answer.
	asks, promises chan struct{}
}

// newDriver returns a driver whose gossip is still off.
func newDriver(cfg Config) driver {
	return driver{
		machine: newMachine(ownership.Config{
			Node: cfg.Node, Permit: cfg.Permit, ClaimDelay: cfg.ClaimDelay, Linger: cfg.Linger, Gossip: cfg.Gossip.Key != nil, Freeze: cfg.Gossip.Freeze,
			Late: lateTime,
		}),
		asks: make(chan struct{}, 1), promises: make(chan struct{}, 1),
	}
}

// machine is the node's ownership.Machine, with the lease that its locks are under.
type machine struct {
	*ownership.Machine

	mu    sync.Mutex // guards lease, and that it is the Machine's
	lease *store.Lease
}

func newMachine(cfg ownership.Config) *machine {
	cfg.Process, cfg.Start = rand.Uint64(), time.Now()
	return &machine{Machine: ownership.New(cfg)}
}

func (m *machine) step(e ownership.Event) []ownership.Effect { return m.Step(time.Now(), e) }

// grant makes a lease the one that the machine's locks are under.
func (m *machine) grant(l *store.Lease) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.lease = l
	m.step(ownership.Granted{Lease: l.ID(), Sent: l.Valid().Add(-l.TTL()), TTL: l.TTL()})
}

// begin begins a round, with the lease of all of it.
func (m *machine) begin(c *plan.Cluster) (lease *store.Lease, now time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	now = time.Now()
	m.Step(now, ownership.View{Cluster: c}) // asks for nothing but what a round begins with
	return m.lease, now
}

func (m *machine) current() *store.Lease {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.lease
}

// answers reports whether the permit to answer for ip is alive, lasts whether that to send with it is.
func (m *machine) answers(ip netip.Addr) bool {
	_, answer := m.Lasts(time.Now(), ip)
	return answer
}

func (m *machine) lasts(ip netip.Addr) bool {
	send, _ := m.Lasts(time.Now(), ip)
	return send
}

// keeps reports whether the lock of ip goes on when this agent stops.
func (m *machine) keeps(ip netip.Addr) bool { return m.Keeps(time.Now(), ip) }

// step gives the machine an event from outside of reconcile, and does what it asks for.
func (a *agent) step(e ownership.Event) (err error) {
	for _, effect := range a.machine.step(e) {
		switch f := effect.(type) {
		case ownership.Withdraw:
			err = errors.Join(err, a.permits.withdraw(nil))
		case ownership.Renew:
			a.permits.soon()
		case ownership.Wake:
			a.wake()
		case ownership.Confirm:
			a.ask()
		case ownership.Say:
			if b, err := json.Marshal(f.Message); err == nil { // it cannot fail
				a.gossip.Send(f.To, b)
			}
		}
	}
	return err
}

// ask begins to ask for a yes.
func (a *agent) ask() {
	notify(a.asks)
	notify(a.promises)
}
