package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/etcd/client/pkg/v3/transport"
	"go.etcd.io/etcd/client/pkg/v3/types"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/membership"
	"go.uber.org/zap"
	"google.golang.org/grpc"
)

const (
	// joinTimeout is for the requests to one member.
	joinTimeout = 20 * time.Second
	mostAnswer  = 1 << 20 // bytes, of a list of members
)

// answer is what a member says of the cluster that it is in.
type answer struct {
	from    string // its URL for members
	cluster types.ID
	members []*membership.Member
}

// at returns the member whose URL for members is this one; nil: the cluster has none. One that was added and has not
// begun yet has no name.
func (a answer) at(url string) *membership.Member {
	for _, m := range a.members {
		if slices.Contains(m.PeerURLs, url) {
			return m
		}
	}
	return nil
}

// urls are the URLs of all members of --initial-cluster, by their names.
func (m *member) urls() (map[string]string, error) {
	members, err := types.NewURLsMap(m.initialCluster)
	if err != nil {
		return nil, err
	}
	out := make(map[string]string, len(members))
	for name, urls := range members {
		out[name] = urls[0].String()
	}
	return out, nil
}

// ask asks all members of --initial-cluster at once what cluster they are in. This member is among the answers where
// another process serves in its place. Unknown says of which others it is not known that they serve nothing: they may
// have data.
func (m *member) ask(ctx context.Context, cfg *embed.Config) (answers []answer, unknown, err error) {
	urls, err := m.urls()
	if err != nil {
		return nil, nil, err
	}
	t, err := transport.NewTransport(cfg.PeerTLSInfo, answerTimeout)
	if err != nil {
		return nil, nil, fmt.Errorf("reading --certs: %w", err)
	}
	defer t.CloseIdleConnections()
	limited, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	all := slices.Sorted(maps.Values(urls))
	said, errs, down := make([]answer, len(all)), make([]error, len(all)), make([]bool, len(all))
	var wg sync.WaitGroup
	for i, from := range all {
		wg.Go(func() {
			if said[i], errs[i] = askOne(limited, t, from); errs[i] != nil {
				down[i] = from == urls[m.name] || isDown(errs[i]) || hasNoPod(ctx, clusterDNS, urls[m.name], from)
			}
		})
	}
	wg.Wait()
	for i, from := range all {
		switch {
		case errs[i] == nil:
			answers = append(answers, said[i])
		case !down[i]:
			unknown = errors.Join(unknown, fmt.Errorf("asking %s: %w", from, errs[i]))
		}
	}
	return answers, unknown, ctx.Err()
}

// isDown reports whether a node says that nobody listens where a member would.
func isDown(err error) bool {
	var dns *net.DNSError // one that does not listen itself says nothing of members
	return errors.Is(err, syscall.ECONNREFUSED) && !errors.As(err, &dns)
}

// clusterDNS fails where one of the answers for IPv4 and IPv6 is missing.
var clusterDNS = &net.Resolver{PreferGo: true, StrictErrors: true}

// hasNoPod reports whether the cluster's DNS has this member's pod, and says that it has none of another member. Why
// that one's name cannot be resolved does not tell: in a pod names get the domains of the cluster first, and what counts
// is the error of the name without, which is that of a DNS outside of the cluster.
func hasNoPod(ctx context.Context, r *net.Resolver, own, other string) bool {
	self, err := url.Parse(own)
	if err != nil {
		return false
	}
	peer, err := url.Parse(other)
	if err != nil {
		return false
	}
	if _, err := netip.ParseAddr(peer.Hostname()); err == nil {
		return false // an address
	}
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	whole, err := r.LookupCNAME(ctx, self.Hostname())
	domain, ok := strings.CutPrefix(whole, self.Hostname()+".")
	if err != nil || !ok {
		return false
	}
	_, err = r.LookupHost(ctx, peer.Hostname()+"."+domain)
	var dns *net.DNSError
	return errors.As(err, &dns) && dns.IsNotFound
}

// askOne asks as a member of etcd does that begins.
func askOne(ctx context.Context, t http.RoundTripper, from string) (a answer, err error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, from+"/members", nil)
	if err != nil {
		return answer{}, err
	}
	resp, err := t.RoundTrip(r)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	a.from = from
	if a.cluster, err = types.IDFromString(resp.Header.Get("X-Etcd-Cluster-ID")); err != nil {
		return answer{}, err
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, mostAnswer)).Decode(&a.members); err != nil {
		return answer{}, err
	}
	if slices.Contains(a.members, nil) {
		return answer{}, errors.New("its list of members has one that is none")
	}
	if len(a.members) == 0 {
		return answer{}, errors.New("it is starting, and knows no members yet")
	}
	return a, nil
}

// begun returns who of the others is of a cluster in which this member had its place before, or never had one; empty:
// none. Where they are at the first start of all, or of all after a restore, they have the ids that follow from
// --initial-cluster and the token, and this member has not told them yet where it serves.
func (m *member) begun(cfg *embed.Config, answers []answer) (by string, err error) {
	members, err := types.NewURLsMap(m.initialCluster)
	if err != nil {
		return "", err
	}
	first, err := membership.NewClusterFromURLsMap(zap.NewNop(), cfg.InitialClusterToken, members)
	if err != nil {
		return "", err
	}
	own := members[m.name][0].String()
	for _, a := range answers {
		if a.from == own {
			return "", fmt.Errorf("--data-dir %s: it has no data, and somebody serves as %s at %s already", m.dataDir, m.name, own)
		}
		self := a.at(own)
		if a.cluster != first.ID() || self == nil || self.ID != first.MemberByName(m.name).ID || len(self.ClientURLs) > 0 {
			by = a.from
		}
	}
	return by, nil
}

// join makes this member, which has no data, one of the cluster of the others: it removes its former self, which can do
// nothing in that cluster from then on, also where its data is found again, and adds a new one. Both take a quorum
// without it, so of two members without data none gets in. Where it ends in between, the next start adds it.
func (m *member) join(ctx context.Context, cfg *embed.Config, answers []answer) error {
	if err := m.areOthers(answers); err != nil {
		return fmt.Errorf("--data-dir %s: it has no data, and %w", m.dataDir, err)
	}
	var errs []error
	for _, a := range answers {
		err := m.joinBy(ctx, cfg, a)
		if err == nil {
			return nil
		}
		errs = append(errs, fmt.Errorf("by %s: %w", a.from, err))
	}
	return fmt.Errorf("joining the others, since --data-dir %s has no data: %w: where %s has data on another node or disk, bring it back; "+
		"where most members have none, have all of them begin with a snapshot (--restore-from)", m.dataDir, errors.Join(errs...), m.name)
}

// areOthers returns an error where the others are not those of --initial-cluster, in one cluster.
func (m *member) areOthers(answers []answer) error {
	urls, err := m.urls()
	if err != nil {
		return err
	}
	own := urls[m.name]
	delete(urls, m.name)
	want := slices.Sorted(maps.Values(urls))
	for _, a := range answers {
		if a.cluster != answers[0].cluster {
			return fmt.Errorf("the others are of two clusters, %s of %s and %s of %s: stop those that are not to go on, and move their data away",
				answers[0].from, answers[0].cluster, a.from, a.cluster)
		}
		var has []string
		for _, x := range a.members {
			if !slices.Contains(x.PeerURLs, own) {
				has = append(has, strings.Join(x.PeerURLs, " "))
			}
		}
		if slices.Sort(has); !slices.Equal(has, want) {
			return fmt.Errorf("%s is of a cluster of %s, where --initial-cluster has %s beside it: how many there are is not to be changed, so set that back "+
				"(etcd.bundled.replicas)", a.from, strings.Join(has, ", "), strings.Join(want, ", "))
		}
	}
	return nil
}

// joinBy does so by one of the others.
func (m *member) joinBy(ctx context.Context, cfg *embed.Config, by answer) error {
	ctx, cancel := context.WithTimeout(ctx, joinTimeout)
	defer cancel()
	c, err := m.admin(by)
	if err != nil {
		return err
	}
	defer c.Close()
	now, err := members(ctx, c)
	if err != nil {
		return err
	}
	log, own := cfg.GetLogger(), cfg.AdvertisePeerUrls[0].String()
	for _, former := range now {
		if !slices.Contains(former.PeerURLs, own) {
			continue
		}
		if err := settled(ctx, func() error { _, err := c.MemberRemove(ctx, former.ID); return err }); err != nil {
			return fmt.Errorf("removing its former self: %w", err)
		}
		log.Warn("removed the member that had this name: its data is not here", zap.String("name", m.name), zap.Stringer("id", types.ID(former.ID)))
	}
	var added *clientv3.MemberAddResponse
	if err := settled(ctx, func() (err error) { added, err = c.MemberAdd(ctx, []string{own}); return err }); err != nil {
		return fmt.Errorf("adding it: %w", err)
	}
	id := types.ID(added.Member.ID)
	log.Warn("added this member anew: it gets all data from the others", zap.String("name", m.name), zap.Stringer("id", id))
	cfg.ClusterState = embed.ClusterStateFlagExisting
	// etcd goes by the list of who answers first.
	for {
		answers, _, err := m.ask(ctx, cfg)
		if err != nil {
			return fmt.Errorf("waiting until the others know that it was added: %w", err)
		}
		late := func(a answer) bool { self := a.at(own); return self == nil || self.ID != id }
		if len(answers) > 0 && !slices.ContainsFunc(answers, late) {
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// members returns who is a member, as a quorum has it now.
func members(ctx context.Context, c *clientv3.Client) ([]*etcdserverpb.Member, error) {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	r, err := c.MemberList(ctx)
	if err != nil {
		return nil, fmt.Errorf("asking a quorum who is a member: %w", err)
	}
	return r.Members, nil
}

// settled changes who is a member. Etcd refuses that for 5 s after its members have found each other.
func settled(ctx context.Context, change func() error) error {
	for {
		err := change()
		if !errors.Is(err, rpctypes.ErrUnhealthy) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(time.Second):
		}
	}
}

// admin returns a client of a member, as etcd's user root.
func (m *member) admin(of answer) (*clientv3.Client, error) {
	self := of.at(of.from)
	if self == nil || len(self.ClientURLs) == 0 {
		return nil, errors.New("it has not said yet where it serves clients")
	}
	at, err := url.Parse(of.from)
	if err != nil {
		return nil, err
	}
	info := transport.TLSInfo{
		CertFile: filepath.Join(m.rootCerts, "tls.crt"), KeyFile: filepath.Join(m.rootCerts, "tls.key"), TrustedCAFile: filepath.Join(m.rootCerts, "ca.crt"),
	}
	tls, err := info.ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("reading --root-certs: %w", err)
	}
	return clientv3.New(clientv3.Config{
		Endpoints: self.ClientURLs, TLS: tls, Logger: zap.NewNop(),
		// The address of a node is not in its certificate; the name by which members dial it is.
		DialOptions: []grpc.DialOption{grpc.WithAuthority(at.Host)},
	})
}

// elsewhere returns an error where most members are of one other cluster than this one's data: they were restored while
// this one was away. etcd itself would wait for ever. Fewer are those that have to go: the others still begin without.
func (m *member) elsewhere(ctx context.Context, cfg *embed.Config, cluster types.ID) error {
	answers, _, err := m.ask(ctx, cfg)
	if err != nil {
		return err
	}
	urls, err := m.urls()
	if err != nil {
		return err
	}
	from := map[types.ID][]string{}
	for _, a := range answers {
		from[a.cluster] = append(from[a.cluster], a.from)
	}
	for other, by := range from {
		if other != cluster && len(by) > len(urls)/2 {
			return fmt.Errorf("--data-dir %s: its data is of cluster %s, and %s of cluster %s: where that one is to go on, as after a restore, move the data "+
				"away, and this member joins it", m.dataDir, cluster, strings.Join(by, ", "), other)
		}
	}
	return nil
}

// stopped returns why etcd stopped: err, but where the cluster has no member of its id any more. Then its data is of no
// use, and is moved away: the next start joins anew.
func (m *member) stopped(ctx context.Context, cfg *embed.Config, e *embed.Etcd, err error) error {
	answers, _, bad := m.ask(ctx, cfg)
	if bad != nil {
		return err
	}
	own, is := cfg.AdvertisePeerUrls[0].String(), func(x *membership.Member) bool { return x.ID == e.Server.MemberID() }
	removed := false
	for _, a := range answers {
		if a.from == own || a.cluster != e.Server.Cluster().ID() {
			continue
		}
		if slices.ContainsFunc(a.members, is) {
			return err // or that one does not know it yet: the next start asks again
		}
		removed = true
	}
	if !removed {
		return err
	}
	e.Server.Stop() // so that nothing writes there any more
	to, bad := m.moveAway("removed")
	if bad != nil {
		return fmt.Errorf("%w: moving the data of a member that was removed from the cluster away: %w", err, bad)
	}
	return fmt.Errorf("%w: --data-dir %s was of a member that was removed from the cluster, as one is that comes up without its data: it is in %s now, and the "+
		"next start joins anew", err, m.dataDir, to)
}
