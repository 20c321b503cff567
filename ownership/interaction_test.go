package ownership

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
)

// TestInteractions runs the scripts of testdata: what happens to a simulated cluster, and what its nodes do about it.
// `go test ./ownership -run Interactions -rewrite` writes down what they do now, for the difference to be read.
//
//	cluster nodes=3 seed=1 [no-gossip]   three agents begin
//	run 3s [quiet]                       time passes; quiet: nothing of it is told
//	kill|stop|start NODE [quiet]         SIGKILL, SIGTERM, and what runs an agent there again
//	power-off|power-on NODE
//	freeze|pause|slow NODE 2s            its agent; the machine with its clock; its requests to etcd
//	cut NODE NODE|etcd 2s                nothing passes between them
//	dead NODE                            the gossip tells all others so, falsely
//	permit NODE 1s                       P of its next agent
//	move NODE                            of the first egress IP, to there
//	backup, restore                      of etcd
//	state                                who has which lock, and whose kernel does what for how long
//	heal                                 all faults end, and time passes until nothing changes any more
func TestInteractions(t *testing.T) {
	datadriven.Walk(t, "testdata", func(t *testing.T, path string) {
		i := interaction{permits: map[string]string{}}
		datadriven.RunTest(t, path, i.do)
	})
}

// interaction is one script on its way.
type interaction struct {
	w      *world
	backup *etcd
	story  strings.Builder
	// permits are those of each kernel, as last told.
	permits map[string]string
}

func (i *interaction) do(t *testing.T, d *datadriven.TestData) string {
	t.Helper()
	if d.Cmd == "cluster" {
		i.cluster(t, d)
		return ""
	}
	i.story.Reset()
	if i.change(t, d); i.w.violation != "" {
		d.Fatalf(t, "%s\n%s", i.w.violation, i.story.String())
	}
	var told strings.Builder
	for line := range strings.Lines(i.story.String()) {
		if !i.usual(line) && !d.HasArg("quiet") {
			told.WriteString(line)
		}
	}
	return told.String()
}

// usual reports whether a line is of a renewal, by a frame or a commit: of the same permits, for less than a second.
func (i *interaction) usual(line string) bool {
	_, what, _ := strings.Cut(strings.TrimSpace(line), "  ") // behind the time
	permits, length, commit := strings.Cut(what, "] for ")
	node, _, _ := strings.Cut(what, ":")
	if !commit {
		return strings.Contains(what, "kernel renewed its permits")
	}
	same := i.permits[node] == permits
	i.permits[node] = permits
	return same && strings.HasSuffix(length, "ms")
}

func (i *interaction) cluster(t *testing.T, d *datadriven.TestData) {
	t.Helper()
	seed, opt := uint64(1), options{nodes: 3, noGossip: d.HasArg("no-gossip"), script: func(*world) {}}
	d.MaybeScanArgs(t, "nodes", &opt.nodes)
	d.MaybeScanArgs(t, "seed", &seed)
	i.w = newWorld(seed, opt)
	i.w.story = &i.story
	for _, n := range i.w.nodes {
		i.w.after(i.w.between(0, 100*time.Millisecond), n.boot)
	}
}

// change does one command to the cluster.
func (i *interaction) change(t *testing.T, d *datadriven.TestData) {
	t.Helper()
	w := i.w
	switch d.Cmd {
	case "run":
		w.run(w.now + i.duration(t, d, 0))
	case "kill":
		i.node(t, d, 0).kill("SIGKILL")
	case "stop":
		i.node(t, d, 0).stop()
	case "start":
		i.node(t, d, 0).boot()
	case "power-off":
		i.node(t, d, 0).powerOff()
	case "power-on":
		n := i.node(t, d, 0)
		n.off = false
		n.boot()
	case "freeze":
		i.node(t, d, 0).freeze(i.duration(t, d, 1))
	case "pause":
		i.node(t, d, 0).pause(i.duration(t, d, 1))
	case "slow":
		i.node(t, d, 0).slow = w.now + i.duration(t, d, 1)
	case "cut":
		if w.healed {
			d.Fatalf(t, "all faults have ended")
		}
		to := etcdEnd
		if d.CmdArgs[1].Key != "etcd" {
			to = i.node(t, d, 1).id
		}
		w.partition(i.node(t, d, 0).id, to, i.duration(t, d, 2), true, true)
	case "dead":
		w.slander(i.node(t, d, 0), func() bool { return true })
	case "permit":
		i.node(t, d, 0).permit = i.duration(t, d, 1)
	case "move":
		w.etcd.requestMove(w.ips[0], i.node(t, d, 0).name, 3*time.Second)
	case "backup":
		i.backup = w.etcd.backup()
	case "restore":
		w.etcd.restore(i.backup)
	case "heal":
		w.heal()
		w.settle()
	case "state":
		i.state()
	default:
		d.Fatalf(t, "there is no command %s", d.Cmd)
	}
}

// node returns the node that is argument k.
func (i *interaction) node(t *testing.T, d *datadriven.TestData, k int) *node {
	t.Helper()
	if len(d.CmdArgs) > k {
		for _, n := range i.w.nodes {
			if n.name == d.CmdArgs[k].Key {
				return n
			}
		}
	}
	d.Fatalf(t, "argument %d: want a node", k+1)
	return nil
}

// duration returns argument k.
func (i *interaction) duration(t *testing.T, d *datadriven.TestData, k int) time.Duration {
	t.Helper()
	if len(d.CmdArgs) > k {
		if out, err := time.ParseDuration(d.CmdArgs[k].Key); err == nil {
			return out
		}
	}
	d.Fatalf(t, "argument %d: want a duration", k+1)
	return 0
}

// state tells of each egress IP who has its lock, and what the kernels do with it.
func (i *interaction) state() {
	w := i.w
	for _, ip := range w.ips {
		if o, owned := w.etcd.owners[ip]; owned {
			i.line("%s: the lock is of %s, under lease %x", ip, o.Node, o.Lease)
		} else {
			i.line("%s: nobody has the lock", ip)
		}
		for _, n := range w.nodes {
			if answers, sends := n.kernel.list[ip]; sends && w.now < n.kernel.until {
				i.line("  %s's kernel answers: %t, for %v", n.name, answers, (n.kernel.until - w.now).Round(time.Millisecond))
			}
		}
	}
}

func (i *interaction) line(format string, args ...any) { fmt.Fprintf(&i.story, format+"\n", args...) }
