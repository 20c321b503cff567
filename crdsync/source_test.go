package crdsync

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
)

// asked notes what lists and watches the API server was asked for.
type asked struct {
	mu   sync.Mutex // guards what follows
	seen []string
}

// unstreamed is the way to an API server that does not stream lists, as those before 1.32, and notes what it is asked
// for.
type unstreamed struct {
	http.RoundTripper
	asked *asked
}

func (u unstreamed) RoundTrip(r *http.Request) (*http.Response, error) {
	v := r.URL.Query()
	if v.Get("sendInitialEvents") == "true" {
		const refused = `{"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Invalid", "code": 422}`
		return &http.Response{
			StatusCode: http.StatusUnprocessableEntity, Header: http.Header{"Content-Type": {"application/json"}}, Request: r,
			Body: io.NopCloser(strings.NewReader(refused)),
		}, nil
	}
	if r.Method == http.MethodGet {
		u.asked.mu.Lock()
		u.asked.seen = append(u.asked.seen, r.URL.Path+"?"+r.URL.RawQuery)
		u.asked.mu.Unlock()
	}
	return u.RoundTripper.RoundTrip(r)
}

func testLatest(c *cluster) {
	r := &asked{}
	kube := rest.CopyConfig(c.kube)
	kube.Wrap(func(next http.RoundTripper) http.RoundTripper { return unstreamed{next, r} })
	c.run(kube)
	c.example()
	c.pod("prod", "a", "node-1", "10.244.1.1", "web")
	c.wantMembers("egress-prod-web", "prod/a=10.244.1.1")
	r.mu.Lock()
	defer r.mu.Unlock()
	lists := 0
	for _, q := range r.seen {
		if !strings.Contains(q, "watch=") {
			lists++
		}
		if strings.HasSuffix(q, "resourceVersion=0") || strings.Contains(q, "resourceVersion=0&") {
			c.Errorf("%s: may be answered by what the API server remembers", q)
		}
	}
	c.Logf("%d lists, %d watches", lists, len(r.seen)-lists)
}

// testHeartbeats: what kubelets write of themselves all the time causes no pass.
func testHeartbeats(c *cluster) {
	c.node("node-1", "192.0.2.1")
	c.node("node-2", "192.0.2.2")
	d := newDirty()
	ctx, cancel := context.WithCancel(c.Context())
	kube := rest.CopyConfig(c.kube)
	kube.Timeout = 0
	src, err := newSource(ctx, kube, nodeDefaults{capacity: 255, followCordon: true}, d, func(string, string) {})
	if err != nil {
		c.Fatal(err)
	}
	done := make(chan struct{})
	go func() { defer close(done); src.run(ctx) }()
	defer func() { cancel(); <-done }()
	if !src.synced(ctx) {
		c.Fatal("the API server could not be read")
	}
	passes := func(change func()) (n int) {
		c.Helper()
		change()
		end := time.After(300 * time.Millisecond)
		for {
			select {
			case <-d.wake:
				if d.take().nodes {
					n++
				}
			case <-end:
				return n
			}
		}
	}
	// whatever the first lists of nodes cause
	seen := func(what string) {
		c.Helper()
		for end := time.After(deadline); ; {
			select {
			case <-d.wake:
				if d.take().nodes {
					return
				}
			case <-end:
				c.Fatalf("%s caused no pass", what)
			}
		}
	}
	seen("that there are nodes")
	passes(func() {})
	nodes := c.core.CoreV1().Nodes()
	beat := func() {
		for i := range 20 {
			n, err := nodes.Get(ctx, "node-1", metav1.GetOptions{})
			if err != nil {
				c.Fatal(err)
			}
			at := metav1.NewTime(time.Now().Add(time.Duration(i) * time.Second))
			n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue, LastHeartbeatTime: at}}
			n.Status.Images = []corev1.ContainerImage{{Names: []string{fmt.Sprint("image-", i)}}}
			if _, err := nodes.UpdateStatus(ctx, n, metav1.UpdateOptions{}); err != nil {
				c.Fatal(err)
			}
		}
	}
	if n := passes(beat); n != 0 {
		c.Errorf("20 heartbeats caused %d passes", n)
	}
	cordon := func() {
		n, err := nodes.Get(ctx, "node-2", metav1.GetOptions{})
		if err != nil {
			c.Fatal(err)
		}
		n.Spec.Unschedulable = true
		if _, err := nodes.Update(ctx, n, metav1.UpdateOptions{}); err != nil {
			c.Fatal(err)
		}
	}
	cordon()
	seen("a cordon")
}
