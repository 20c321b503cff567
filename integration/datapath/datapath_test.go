package datapath

import (
	"encoding/xml"
	"errors"
	"fmt"
	"io"
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
	os.Exit(m.Run())
}

func TestEveryPathHasEveryColumn(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("a lab makes network namespaces: run as root")
	}
	cfg := Config{Lab: lab.Config{Name: lab.OwnName("datapath")}, Rounds: 1, Duration: 100 * time.Millisecond}
	results, err := Run(t.Context(), cfg, func(Result) {})
	if err != nil {
		t.Fatal(err)
	}
	if len(results) != len(Paths) {
		t.Errorf("%d results, want one of each of %d paths", len(results), len(Paths))
	}
	for _, r := range results {
		for i, v := range r.Values {
			if v <= 0 {
				t.Errorf("%s: no %s", r.Path, Columns[i].Name)
			}
		}
	}
	for _, p := range Paths {
		for i := range Columns {
			if p.Base != "" && Ratios(results, p, i).Median <= 0 {
				t.Errorf("no ratio of %s to %s in %s", p.Name, p.Base, Columns[i].Name)
			}
		}
	}
	var table strings.Builder
	if err := WriteTable(&table, results); err != nil {
		t.Fatal(err)
	}
	t.Logf("\n%s", &table)
}

func TestValidateReportsEveryFault(t *testing.T) {
	err := Config{Duration: time.Millisecond}.Validate()
	for _, want := range []string{"0 rounds", "duration 1ms"} {
		if !strings.Contains(fmt.Sprint(err), want) {
			t.Errorf("error %v, want it to say %s", err, want)
		}
	}
}

func TestRatiosAreOfOneRoundAndAboveOneIsBetter(t *testing.T) {
	var results []Result
	for round, v := range [][2]float64{{100, 50}, {10, 10}, {1000, 2000}} {
		for i, path := range []string{"vxlan", "remote"} {
			results = append(results, Result{round + 1, path, [len(Columns)]float64{0: v[i], 4: v[i]}})
		}
	}
	remote := Paths[len(Paths)-1]
	for column, want := range map[int]Spread{0: {0.5, 1, 2}, 4: {0.5, 1, 2}} {
		if got := Ratios(results, remote, column); got != want {
			t.Errorf("%s: %v, want %v", Columns[column].Name, got, want)
		}
	}
	if got := Ratios(results[:2], remote, 4); got.Median != 2 {
		t.Errorf("half the latency is %v times as good, want 2", got.Median)
	}
	if got, want := Values(results, "remote", 0), (Spread{10, 50, 2000}); got != want {
		t.Errorf("values %v, want %v", got, want)
	}
}

func TestFilesHoldEveryResult(t *testing.T) {
	results := []Result{{1, "vxlan", [len(Columns)]float64{1, 2, 3, 4, 5, 6}}, {1, "remote", [len(Columns)]float64{2, 2, 3, 4, 5, 6.25}}}
	var csv, svg strings.Builder
	if err := errors.Join(WriteCSV(&csv, results), WriteSVG(&svg, results)); err != nil {
		t.Fatal(err)
	}
	want := "round,path,tcp_Mbit_per_s,datagrams_per_s,connections_per_s,requests_per_s,p50_us,p99_us," +
		"base,tcp_ratio,datagrams_ratio,connections_ratio,requests_ratio,p50_ratio,p99_ratio\n" +
		"1,vxlan,1.0,2.0,3.0,4.0,5.0,6.0,,,,,,,\n1,remote,2.0,2.0,3.0,4.0,5.0,6.2,vxlan,2.000,1.000,1.000,1.000,1.000,0.960\n"
	if csv.String() != want {
		t.Errorf("CSV:\n%swant:\n%s", &csv, want)
	}
	for d := xml.NewDecoder(strings.NewReader(svg.String())); ; {
		if _, err := d.Token(); err == io.EOF {
			break
		} else if err != nil {
			t.Fatalf("the plot is no XML: %v\n%s", err, &svg)
		}
	}
}
