package failover

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/integration/lab"
)

func TestMain(m *testing.M) {
	if status, ok := lab.Helper(os.Args); ok {
		os.Exit(status)
	}
	os.Exit(m.Run())
}

// Of two nodes the one that is left has to take over, too.
func TestPowerOffIsMeasuredAndTheNextOwnerIsPoweredOffToo(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("a lab makes network namespaces: run as root")
	}
	for _, nodes := range []int{2, 3} {
		t.Run(fmt.Sprint(nodes), func(t *testing.T) { powerOff(t, lab.Config{Nodes: nodes}) })
	}
}

// docs/install.md names the oldest etcd that is tested.
func TestTheOldestEtcdIsThatOfThePage(t *testing.T) {
	page, err1 := os.ReadFile("../../docs/install.md")
	module, err2 := os.ReadFile("../etcd/go.mod")
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	pinned := regexp.MustCompile(`(?m)^require go.etcd.io/etcd/server/v3 v(\S+)$`).FindSubmatch(module)
	if pinned == nil || !strings.Contains(string(page), "\n| etcd of your own | "+string(pinned[1])+" |") {
		t.Errorf("integration/etcd is of %q, which is not what the page says is needed at least", pinned)
	}
}

func TestTheOldestEtcdServesPowerOffAndMoves(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("a lab makes network namespaces: run as root")
	}
	oldest := lab.Config{Nodes: 3, EtcdMembers: 3, Etcd: lab.OldestEtcd()}
	powerOff(t, oldest)
	oldest.Name = lab.OwnName("failover")
	results, err := Run(t.Context(), Config{Lab: oldest, Fault: "move", Runs: 6}, func(run int, r Result) { t.Logf("move %d: %v, %d lost", run, r.Gap, r.Lost) })
	if err != nil {
		t.Fatal(err)
	}
	lossless := 0 // on a busy machine a datagram may be lost to the probe itself
	for _, r := range results {
		if r.Lost == 0 {
			lossless++
		}
	}
	if lossless < len(results)/2 {
		t.Errorf("%d of %d moves lost nothing", lossless, len(results))
	}
}

func powerOff(t *testing.T, in lab.Config) {
	in.Name = lab.OwnName("failover")
	cfg := Config{Lab: in, Fault: "power-off", Runs: 2}
	runs := 0
	results, err := Run(t.Context(), cfg, func(run int, r Result) {
		runs++
		t.Logf("run %d: %v, %d lost", run, r.Gap, r.Lost)
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(results) != cfg.Runs || runs != cfg.Runs {
		t.Errorf("%d results, %d calls of done: want %d of both", len(results), runs, cfg.Runs)
	}
	for _, r := range results {
		gap := r.Gap
		// Below half a second the new owner would not have waited for the old one's permit.
		if gap < 500*time.Millisecond || gap > 2500*time.Millisecond {
			t.Errorf("%v without an answer, want 0.5s to 1s, 2.5s on a busy machine", gap)
		}
	}
}

func TestValidateReportsEveryFault(t *testing.T) {
	err := Config{Lab: lab.Config{Nodes: 1}, Fault: "flood"}.Validate()
	for _, want := range []string{`"flood"`, "0 runs", "1 nodes"} {
		if !strings.Contains(fmt.Sprint(err), want) {
			t.Errorf("error %v, want it to say %s", err, want)
		}
	}
	for _, fault := range Faults {
		if err := (Config{Lab: lab.Config{Nodes: 3}, Fault: fault, Runs: 1}).Validate(); err != nil {
			t.Errorf("%s: %v", fault, err)
		}
	}
}

func TestFilesHoldEveryRun(t *testing.T) {
	cfg := Config{Lab: lab.Config{Nodes: 10}, Fault: "move", Runs: 3}
	gaps := []Result{{12 * time.Millisecond, 11}, {1500 * time.Microsecond, 0}, {7 * time.Millisecond, 6}}
	var csv, svg strings.Builder
	if err := errors.Join(WriteCSV(&csv, cfg, gaps), WriteSVG(&svg, cfg, gaps)); err != nil {
		t.Fatal(err)
	}
	if want := "fault,nodes,gap_ms,lost\nmove,10,12.0,11\nmove,10,1.5,0\nmove,10,7.0,6\n"; csv.String() != want {
		t.Errorf("CSV:\n%swant:\n%s", &csv, want)
	}
	if n := strings.Count(svg.String(), "H"); n != len(gaps) {
		t.Errorf("the curve has %d steps, want %d:\n%s", n, len(gaps), &svg)
	}
	for d := xml.NewDecoder(strings.NewReader(svg.String())); ; {
		if _, err := d.Token(); err == io.EOF {
			break
		} else if err != nil {
			t.Fatalf("the plot is no XML: %v\n%s", err, &svg)
		}
	}
}

// A node whose agent stands still for half a second is taken for dead.
func TestANodeThatStoodStillIsCountedAsSuspected(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("a lab makes network namespaces: run as root")
	}
	cfg := lab.Config{Name: lab.OwnName("deaths"), Nodes: 3}
	l, err := lab.Up(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Down(context.Background()); err != nil {
			t.Error(err)
		}
	})
	h, err := hold(t.Context(), l, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer h.close()
	node := h.owners[ownersOf+ip.String()]
	for range 3 { // on a busy machine the others may not ask it meanwhile
		frozen := make(chan error, 1)
		go func() {
			err := l.Freeze(t.Context(), node)
			time.Sleep(450 * time.Millisecond)
			frozen <- errors.Join(err, l.Thaw(t.Context(), node))
		}()
		d, err := h.look(t.Context(), 3*time.Second)
		if err := errors.Join(err, <-frozen); err != nil {
			t.Fatal(err)
		}
		if t.Log(d); d.Suspicions > 0 {
			return
		}
	}
	t.Error("nobody suspected it")
}
