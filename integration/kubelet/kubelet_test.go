// Package kubelet tests Egret as its users have it: installed by its chart with kubectl, in a lab whose nodes have
// kubelets. It has nothing but tests.
package kubelet

import (
	"context"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/integration/lab"
	"github.com/egret-project/egret/internal/need"
)

var (
	image    = flag.String("image", "", "archive of Egret's image, as make image makes it")
	name     = flag.String("image-name", "", "name and tag that the archive gives the image")
	nextTag  = flag.String("next-tag", "", "tag of the version that follows, of the same repository")
	nextFile = flag.String("next-image", "", "archive of that version")
)

func TestMain(m *testing.M) {
	if status, ok := lab.Helper(os.Args); ok {
		os.Exit(status)
	}
	os.Exit(m.Run())
}

// TestAnInstalledEgret is the life of Egret in one cluster of kubelets, from the installation to the end, by the
// commands of docs/install.md: with an etcd that is there, in short, with the chart's, and with one that is there and has
// TLS. Each step goes on from where the one before left off. What follows a failed one is told, too, but only from a
// cluster with Egret.
func TestAnInstalledEgret(t *testing.T) {
	need.Root(t)
	if *image == "" || *nextFile == "" {
		t.Skip("no -image and -next-image: run it with make test-kubelet")
	}
	need.CgroupV1(t)
	ways := []way{
		{"an etcd of one's own, and kubectl apply", []step{{install, appliedWithOwnEtcd}, {guideLeaves, guide}, {uninstall, deletedByKubectl}}},
		{"the bundled etcd, and helm install", slices.Concat([]step{{install, helmInstalled}}, life(), []step{
			{"etcd begins again with a snapshot", restored}, {uninstall, uninstalledByHelm},
		})},
		{"an etcd of one's own with TLS, and helm install", slices.Concat([]step{{install, helmInstalledWithOwnEtcd}}, life(), []step{
			{"a version that does not get ready stops at the first node", stopsAtTheFirst},
			{"a new node gets no pods before its agent is ready", keptOff}, {uninstall, uninstalledByHelm},
		})},
	}
	begin := time.Now()
	l, err := lab.Up(t.Context(), lab.Config{
		Name: lab.OwnName("kubelet"), Nodes: 3, Kubelet: true, CNI: *cni, Images: []string{*image, *nextFile},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { down(t, l) })
	t.Logf("a cluster of three kubelets is ready after %v", time.Since(begin).Round(time.Second))
	c := &cluster{lab: l, rendered: map[string]string{}}
	for _, way := range ways {
		if !t.Run(way.name, func(t *testing.T) { c.way = t; walk(t, c, way.steps) }) {
			return
		}
	}
}

const (
	install     = "it is installed and gets ready"
	guideLeaves = "pods of two Deployments leave as the guide's example says"
	uninstall   = "it is uninstalled and the nodes are as before"
)

// life returns the steps that are the same whosever etcd it is.
func life() []step {
	return []step{
		{guideLeaves, guide},
		{"each part of Egret writes its own keys of etcd alone", eachItsOwn},
		{"who may view the cluster reads egresses, and its admin writes them", readers},
		{"an operator's machine reaches etcd through the cluster", operated},
		{"agents and crdsync are scraped, and the status page shows what passes by egress IPs", measured},
		{"selected pods reach other pods with their own addresses", amongPods},
		{"an IPv6 egress beside them", sixth},
		{"the CNI is restarted on all nodes without a packet lost", restartedCNI},
		{"no two replicas of crdsync are on one node", keptApart},
		{"a node whose kubelet and containerd are dead serves on", deadKubelet},
		{"a new version is rolled out, and the old one again, without a packet lost", rolled},
		{"crdsync's leader is deleted and the other one goes on", leaderDeleted},
		{"the gateway is drained by kubectl without a packet lost", drained},
	}
}

// way is how Egret is installed, with all that is done with it then.
type way struct {
	name  string
	steps []step
}

type step struct {
	name string
	run  func(*testing.T, *cluster)
}

func walk(t *testing.T, c *cluster, steps []step) {
	for _, step := range steps {
		begin := time.Now()
		if !t.Run(step.name, func(t *testing.T) { step.run(t, c.in(t)) }) {
			c.in(t).explain()
			if step.name == install {
				return
			}
		}
		t.Logf("%s: %v", step.name, time.Since(begin).Round(100*time.Millisecond))
	}
}

func down(t *testing.T, l *lab.Lab) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := l.Down(ctx); err != nil {
		t.Errorf("removing the lab: %v", err)
	}
	if left, _ := filepath.Glob("/sys/fs/cgroup/*/egret-lab-" + lab.OwnName("kubelet")); len(left) > 0 {
		t.Errorf("cgroups after Down: got %q, want none", left)
	}
}

// split returns the repository and the tag of an image's name. A registry's port has a colon, too.
func split(name string) (repository, tag string) {
	if i := strings.LastIndexByte(name, ':'); i > strings.LastIndexByte(name, '/') {
		return name[:i], name[i+1:]
	}
	return name, ""
}

func TestTheNameOfAnImageOfARegistryWithAPortIsUnderstood(t *testing.T) {
	for name, want := range map[string][2]string{
		"ghcr.io/egret-project/egret:1.0": {"ghcr.io/egret-project/egret", "1.0"},
		"registry:5000/egret:tag":         {"registry:5000/egret", "tag"},
		"registry:5000/egret":             {"registry:5000/egret", ""},
	} {
		if repository, tag := split(name); repository != want[0] || tag != want[1] {
			t.Errorf("split(%q): got %q and %q, want %q", name, repository, tag, want)
		}
	}
}
