package scale

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/integration/lab"
)

func TestMain(m *testing.M) {
	if status, ok := lab.Helper(os.Args); ok {
		os.Exit(status)
	}
	if status, ok := Helper(os.Args); ok {
		os.Exit(status)
	}
	os.Exit(m.Run())
}

func TestThirtyNodesAreMeasured(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("a lab makes network namespaces: run as root")
	}
	cfg := Config{
		Lab:     lab.Config{Name: lab.OwnName("scale")},
		Cluster: Cluster{Nodes: 30, Gateways: 4, Egresses: 40, Pods: 200, TakeOver: 20},
		Rest:    2 * time.Second, Events: 8, Rollout: time.Minute, AtOnce: 2,
	}
	r, err := Run(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	var table strings.Builder
	if err := WriteTable(&table, r); err != nil {
		t.Fatal(err)
	}
	t.Logf("\n%s", &table)
	for i, row := range Rows {
		if !r.Measured[i] {
			t.Errorf("%s: not measured", row.Name)
		}
	}
	for _, want := range []struct {
		row   row
		value float64
	}{{takenIPs, 20}, {rolled, 28}, {kernelMissed, 0}} {
		if got := r.Values[want.row]; got != want.value {
			t.Errorf("%s: %g, want %g", Rows[want.row].Name, got, want.value)
		}
	}
	// Three gateways ask ten times a second, and the agent of node 1, too; no other one does.
	if reads := r.Values[restReads]; reads < 20 || reads > 60 {
		t.Errorf("at rest %.0f reads a second, want 40", reads)
	}
}

func TestValidateReportsEveryFault(t *testing.T) {
	err := Config{Cluster: Cluster{Nodes: 1, Egresses: 1, TakeOver: 4}}.Validate()
	for _, want := range []string{"0 gateways", "4 IPs to take over", "0 pods", "rest 0s"} {
		if !strings.Contains(fmt.Sprint(err), want) {
			t.Errorf("error %v, want it to say %s", err, want)
		}
	}
}

func TestASmallerClusterIsInProportion(t *testing.T) {
	cfg := Config{
		Cluster: Cluster{Nodes: 5000, Gateways: 50, Egresses: 5000, Pods: 100000, TakeOver: 200}, Rest: time.Minute, Events: 20, AtOnce: 4,
	}
	small := cfg.Of(50)
	if want := (Cluster{Nodes: 50, Gateways: 3, Egresses: 120, Pods: 1000, TakeOver: 200}); small.Cluster != want {
		t.Errorf("%+v, want %+v", small.Cluster, want)
	}
	if err := errors.Join(cfg.Validate(), small.Validate()); err != nil {
		t.Error(err)
	}
}

func TestNoTwoPodsShareAnAddress(t *testing.T) {
	c := Cluster{Nodes: 50, Gateways: 3, Egresses: 120, Pods: 1000, TakeOver: 200}
	seen := map[string]int{}
	for i := range c.Pods {
		for _, ip := range c.podIPs(i) {
			if other, taken := seen[ip.String()]; taken {
				t.Fatalf("pods %d and %d have %s", other, i, ip)
			}
			seen[ip.String()] = i
		}
	}
	for n := 1; n <= c.Nodes; n++ {
		for i := range 3 {
			if got := c.node(c.podOf(n, i)); got != n {
				t.Errorf("a pod of node %d is on node %d", n, got)
			}
		}
	}
}

func TestTheTableSaysWhichGoalsAreMissed(t *testing.T) {
	small, large := Result{Cluster: Cluster{Nodes: 50}}, Result{Cluster: Cluster{Nodes: 5000}}
	small.add(restReads, 40)
	large.add(restReads, 2000)
	large.add(restAgentMB, 12.5)
	var table, csv strings.Builder
	if err := errors.Join(WriteTable(&table, small, large), WriteCSV(&csv, small, large)); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"x50.0", "goal 1000: missed", "goal 60: met"} {
		if !strings.Contains(table.String(), want) {
			t.Errorf("table without %q:\n%s", want, &table)
		}
	}
	want := "nodes,gateways,egresses,pods,what,unit,value,goal\n" +
		"50,0,0,0,\"at rest: etcd reads\",1/s,40.000,1000\n" +
		"5000,0,0,0,\"at rest: etcd reads\",1/s,2000.000,1000\n5000,0,0,0,\"at rest: agent memory\",MB,12.500,60\n"
	if csv.String() != want {
		t.Errorf("CSV:\n%swant:\n%s", &csv, want)
	}
	if got := fmt.Sprint(large.Missed()); got != "[at rest: etcd reads]" {
		t.Errorf("missed %s", got)
	}
}
