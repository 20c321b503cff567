package operator

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/plan"
	"github.com/egret-project/egret/store"
)

// Verdict is the error of a command that has done what it was asked for, and found something wrong.
type Verdict struct {
	Status int // the exit status: 2, something is broken; 3, something is degraded
	Text   string
	Said   bool // the output has the text already
}

func (v Verdict) Error() string { return v.Text }

// overview is what Status prints.
type overview struct {
	Etcd     string            `json:"etcd"`
	Leader   string            `json:"crdsync"`
	Nodes    map[string]int    `json:"nodes"`
	Egresses map[string]int    `json:"egresses"`
	Pools    map[string]string `json:"pools"`
	Moves    []egress.Move     `json:"moves,omitempty"`
	Cordons  []egress.Cordon   `json:"cordons,omitempty"`
	Troubles []Trouble         `json:"troubles,omitempty"`
}

// Status writes the whole system on one screen, in a format: "json", "yaml", or "" for text. The error is a Verdict
// when something is wrong.
func Status(ctx context.Context, c *store.Client, format string, w io.Writer) error {
	if err := CheckReport(format); err != nil {
		return err
	}
	whole, err := c.ReadWhole(ctx)
	if err != nil {
		return err
	}
	space, err := c.Space(ctx)
	if err != nil {
		return err
	}
	return status(whole, space, time.Now(), format, w)
}

func status(whole store.Whole, space store.Space, now time.Time, format string, w io.Writer) error {
	o := overview{Leader: whole.Leader, Nodes: map[string]int{"all": len(whole.Nodes)}, Egresses: map[string]int{"all": len(whole.Egresses)}, Pools: map[string]string{}}
	o.Troubles = troublesOf(whole, space)
	o.Etcd = fmt.Sprintf("%d members, revision %d", space.Count, space.Revision)
	for _, name := range slices.Sorted(maps.Keys(whole.Nodes)) {
		if _, alive := whole.Agents[name]; alive {
			o.Nodes["alive"]++
		}
		if plan.Cordoned(&whole.Snapshot, name) {
			o.Nodes["cordoned"]++
		}
	}
	pods := 0
	for name, nodes := range whole.ByEgress {
		if _, there := whole.Egresses[name]; there {
			for _, m := range nodes {
				pods += len(m.Pods)
			}
		}
	}
	o.Egresses["pods"] = pods
	for _, p := range whole.Egresses {
		for _, a := range p.Addresses {
			o.Egresses["ips"]++
			if _, held := whole.Owners[a.IP]; held {
				o.Egresses["held"]++
			}
		}
	}
	used := map[string]int{}
	for _, a := range whole.Allocations {
		used[a.Pool]++
	}
	for name, p := range whole.Pools {
		o.Pools[name] = fmt.Sprintf("%d of %d", used[name], p.Total())
	}
	for _, ip := range slices.SortedFunc(maps.Keys(whole.Moves), netip.Addr.Compare) {
		o.Moves = append(o.Moves, whole.Moves[ip])
	}
	for _, node := range slices.Sorted(maps.Keys(whole.Cordons)) {
		o.Cordons = append(o.Cordons, whole.Cordons[node])
	}
	if err := writeReport(w, format, o, func() error { return o.write(w, now) }); err != nil {
		return err
	}
	return o.verdict()
}

func (o overview) verdict() error {
	n := map[Level]int{}
	for _, t := range o.Troubles {
		n[t.Level]++
	}
	switch {
	case n[Broken] > 0:
		return Verdict{Status: 2, Text: fmt.Sprintf("%d broken, %d degraded", n[Broken], n[Degraded])}
	case n[Degraded] > 0:
		return Verdict{Status: 3, Text: fmt.Sprintf("%d degraded", n[Degraded])}
	}
	return nil
}

// How many are written in words, so that all of it is a screen.
const maxTroubles, maxListed = 20, 5

func (o overview) write(w io.Writer, now time.Time) error {
	rows := [][]string{
		{"etcd", o.Etcd},
		{"crdsync", "leader " + nobody(o.Leader)},
		{"nodes", fmt.Sprintf("%d, %d with a live agent, %d cordoned", o.Nodes["all"], o.Nodes["alive"], o.Nodes["cordoned"])},
		{"egresses", fmt.Sprintf("%d with %d pods; %d of %d IPs are held", o.Egresses["all"], o.Egresses["pods"], o.Egresses["held"], o.Egresses["ips"])},
	}
	var pools []string
	for _, name := range slices.Sorted(maps.Keys(o.Pools)) {
		pools = append(pools, name+" "+o.Pools[name])
	}
	if len(pools) > maxListed {
		pools = append(pools[:maxListed], fmt.Sprintf("and %d more (egret get pools)", len(pools)-maxListed))
	}
	rows = append(rows, []string{"pools", some(pools)})
	// add adds rows, of n at most so many; where says where all are.
	add := func(n, most int, where string, row func(i int) []string) {
		for i := range min(n, most) {
			rows = append(rows, row(i))
		}
		if n > most {
			rows = append(rows, []string{"", fmt.Sprintf("and %d more (%s)", n-most, where)})
		}
	}
	add(len(o.Moves), maxListed, "egret get moves", func(i int) []string {
		m := o.Moves[i]
		return []string{"moves", fmt.Sprintf("%s to %s, asked for %s ago", m.IP, m.To, age(now, m.Since))}
	})
	add(len(o.Cordons), maxListed, "egret get cordons", func(i int) []string {
		c := o.Cordons[i]
		return []string{"cordon", fmt.Sprintf("%s, %s ago", c.Node, age(now, c.Since))}
	})
	add(len(o.Troubles), maxTroubles, "-o json has all", func(i int) []string {
		t := o.Troubles[i]
		return []string{string(t.Level), t.What + ": " + t.Why}
	})
	if o.verdict() == nil {
		rows = append(rows, []string{"all is well", ""})
	}
	return writeTable(w, "", rows)
}
