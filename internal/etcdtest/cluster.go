package etcdtest

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
)

// Cluster is several etcd servers that are members of one cluster. Its methods are for the goroutine of the test.
type Cluster struct {
	t       testing.TB
	options []func(*embed.Config)
	made    int // servers, those that were replaced included
	members []*Server
}

// NewCluster starts a cluster of n members that runs until the test ends, with their configuration changed by the
// options. The test fails when it cannot start.
func NewCluster(t testing.TB, n int, options ...func(*embed.Config)) *Cluster {
	t.Helper()
	c := &Cluster{t: t, options: options}
	for range n {
		c.members = append(c.members, c.server())
	}
	for _, m := range c.members {
		m.cluster = c.names()
		m.launch()
	}
	for _, m := range c.members {
		m.await()
	}
	return c
}

func (c *Cluster) server() *Server {
	c.made++
	return newServer(c.t, fmt.Sprintf("etcd%d", c.made), c.options)
}

func (c *Cluster) names() string {
	var names []string
	for _, m := range c.members {
		names = append(names, m.member())
	}
	return strings.Join(names, ",")
}

// Endpoints returns the addresses of the members that clients dial, those of stopped ones included.
func (c *Cluster) Endpoints() []string {
	var out []string
	for _, m := range c.members {
		out = append(out, m.Endpoint())
	}
	return out
}

// Member returns member i. Its Cut and Freeze are between it and its clients; the other members reach it.
func (c *Cluster) Member(i int) *Server { return c.members[i] }

// Stop kills member i; its data stays.
func (c *Cluster) Stop(i int) { c.members[i].Stop() }

// Start starts members with the data that they had, and returns when they serve: a majority has to run then.
func (c *Cluster) Start(members ...int) {
	c.t.Helper()
	for _, i := range members {
		c.members[i].launch()
	}
	for _, i := range members {
		c.members[i].await()
	}
}

// Leader returns the running member that leads, once there is one.
func (c *Cluster) Leader() int {
	c.t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for end := time.After(startTimeout); ; {
		for i, m := range c.members {
			if m.etcd != nil && m.etcd.Server.Leader() == m.etcd.Server.MemberID() {
				return i
			}
		}
		select {
		case <-tick.C:
		case <-end:
			c.t.Fatalf("no leader of etcd within %v", startTimeout)
		}
	}
}

// Replace kills member i, and takes it out of the cluster for a new one of another address and without data.
func (c *Cluster) Replace(i int) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	id := uint64(c.members[i].etcd.Server.MemberID())
	c.Stop(i)
	admin := c.members[c.Leader()].Client()
	if _, err := admin.MemberRemove(ctx, id); err != nil {
		c.t.Fatalf("removing a member of etcd: %v", err)
	}
	m := c.server()
	m.state = embed.ClusterStateFlagExisting
	if _, err := admin.MemberAdd(ctx, []string{"http://" + m.peers.addr()}); err != nil {
		c.t.Fatalf("adding a member to etcd: %v", err)
	}
	for j, other := range c.members { // the new one asks any of them who the members are
		if j == i || other.etcd == nil {
			continue
		}
		// linearizable: it knows of the new one when it answers
		if _, err := other.Client().MemberList(ctx); err != nil {
			c.t.Fatalf("listing the members of etcd at member %d: %v", j, err)
		}
	}
	c.members[i] = m
	m.cluster = c.names()
	m.Start()
}
