package faults

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/egret-project/egret/integration/lab"
)

// Step is one thing that is done to the lab.
type Step struct {
	At     time.Duration // since the round began; the step before may take longer
	Verb   string
	Target string // a node, or a process
	What   string // the rest: what a node is cut off from, the number of an egress IP
}

// String prints the step as a line of a table.
func (s Step) String() string {
	return strings.TrimRight(fmt.Sprintf("%6.2fs  %-9s %-10s %s", s.At.Seconds(), s.Verb, s.Target, s.What), " ")
}

// fault is something that may be injected.
type fault struct {
	verb string
	undo string // what mends it; empty: nothing has to
	// area is what the fault takes hold of: one fault at a time for each area of a target.
	area string
	// needs are the processes that have to run.
	needs []string
	// what returns the rest of the step; nil: nothing.
	what func(*rand.Rand) string
}

const (
	etcd      = "etcd"
	apiServer = "apiserver"
	crdsync   = "crdsync"
)

var nodeFaults = []fault{
	{verb: "crash", undo: "recover", area: "process"},
	{verb: "freeze", undo: "thaw", area: "process"},
	{verb: "stop", undo: "start", area: "process"},
	{verb: "kill", undo: "start", area: "process"},
	{verb: "restart", area: "process"},
	{verb: "cut", undo: "heal", area: "network", what: func(r *rand.Rand) string {
		return pick(r, append(slices.Clone(lab.Cuts), "etcd+peers"))
	}},
	{verb: "drain", undo: "uncordon", area: "cordon", needs: []string{etcd}},
	{verb: "unlabel", undo: "label", area: "label", needs: []string{apiServer}},
	{verb: "move", needs: []string{etcd}, what: func(r *rand.Rand) string { return fmt.Sprint(r.IntN(addresses)) }},
	{verb: "pod", undo: "unpod", area: "pod", needs: []string{apiServer}},
}

var processFaults = []fault{
	{verb: "stop", undo: "start", area: "process"},
}

var poolFaults = []fault{
	{verb: "extend", undo: "shrink", area: "range", needs: []string{apiServer}},
	{verb: "narrow", undo: "widen", area: "selector", needs: []string{apiServer}, what: func(r *rand.Rand) string { return lab.NodeName(1 + r.IntN(nodes)) }},
}

// The lab of the schedule. nodes and addresses are part of what a seed means.
const (
	nodes     = 5
	addresses = 6 // egress IPs
)

var pools = []string{"first", "second", "third-4", "third-6"}

// broken is a fault that was injected and not mended.
type broken struct{ target, area string }

// Schedule returns the steps of a round. It is the same for the same seed and round, always. Every step is possible
// when it comes: nothing is broken twice, and nothing is asked of what was stopped. Whatever a step breaks, a later one
// mends.
func Schedule(seed uint64, round int) []Step {
	r := rand.New(rand.NewPCG(seed, uint64(round)))
	p := planner{rand: r, broken: map[broken]Step{}}
	for range 6 + r.IntN(7) {
		p.at += time.Duration(50+r.IntN(1200)) * time.Millisecond
		p.step()
	}
	// What others need comes back first: what is asked of etcd or the API server could not be mended otherwise.
	for _, name := range []string{etcd, apiServer, crdsync} {
		p.mend(broken{name, "process"})
	}
	rest := make([]broken, 0, len(p.broken))
	for b := range p.broken {
		rest = append(rest, b)
	}
	slices.SortFunc(rest, func(a, b broken) int { return strings.Compare(a.target+a.area, b.target+b.area) })
	r.Shuffle(len(rest), func(i, j int) { rest[i], rest[j] = rest[j], rest[i] })
	for _, b := range rest {
		p.mend(b)
	}
	return p.steps
}

type planner struct {
	rand   *rand.Rand
	at     time.Duration
	steps  []Step
	broken map[broken]Step // what mends it
}

// step adds one fault, or mends one.
func (p *planner) step() {
	for {
		faults, target := nodeFaults, lab.NodeName(1+p.rand.IntN(nodes))
		switch p.rand.IntN(10) {
		case 0:
			faults, target = processFaults, pick(p.rand, []string{etcd, apiServer, crdsync})
		case 1:
			faults, target = poolFaults, pick(p.rand, pools)
		}
		f := pick(p.rand, faults)
		what := ""
		if f.what != nil {
			what = f.what(p.rand)
		}
		b := broken{target, f.area}
		if _, ok := p.broken[b]; ok && f.area != "" {
			if p.possible(f.needs) {
				p.mend(b)
				return
			}
			continue
		}
		_, cut := p.broken[broken{target, "network"}]
		mend, off := p.broken[broken{target, "process"}]
		off = off && mend.Verb == "recover"
		switch {
		case !p.possible(f.needs), f.verb == "crash" && cut, off && (f.verb == "cut" || f.verb == "pod"):
			continue
		}
		p.steps = append(p.steps, Step{p.at, f.verb, target, what})
		if f.undo != "" {
			p.broken[b] = Step{Verb: f.undo, Target: target, What: what}
		}
		return
	}
}

// possible reports whether all the processes run.
func (p *planner) possible(needs []string) bool {
	return !slices.ContainsFunc(needs, func(name string) bool {
		_, stopped := p.broken[broken{name, "process"}]
		return stopped
	})
}

// mend adds the step that mends b, if it is broken.
func (p *planner) mend(b broken) {
	s, ok := p.broken[b]
	if !ok {
		return
	}
	delete(p.broken, b)
	s.At = p.at
	p.steps = append(p.steps, s)
}

func pick[T any](r *rand.Rand, of []T) T { return of[r.IntN(len(of))] }
