package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"github.com/egret-project/egret/crdsync"
	"github.com/egret-project/egret/crdsync/credentials"
	"github.com/egret-project/egret/store"
)

// rbacRetry is how soon what failed is tried again: a new version's agents may wait for it.
const rbacRetry = 5 * time.Second

// rbac are the flags of `egret etcd-rbac`.
type rbac struct {
	etcd                     etcdFlags
	agent, crdsync, operator []string
	cloud                    []string
	root                     string
	apply, enable, makeRoom  bool
	narrow                   bool
	keep                     time.Duration
}

func rbacCommand() *cobra.Command {
	var r rbac
	var logs logFlags
	c := &cobra.Command{
		Use:   "etcd-rbac",
		Short: "Print, or make, etcd's users and roles that let each part of Egret write its own keys alone",
		Long: "Compares etcd's users and roles with what agents, crdsync and operators need, and prints what is missing or too much as etcdctl's commands;\n" +
			"with --apply it adds what is missing. A right that a role has is taken away with --narrow alone: daemons of the version before or after this\n" +
			"one may still use it. A user is the common name of a client certificate. With --enable etcd holds all of its clients to their roles from then\n" +
			"on, those of others too. Where it does so already, this takes the user root. With --keep it goes on.",
		Args: cobra.NoArgs,
	}
	s := c.Flags()
	r.etcd.addOperator(s)
	s.StringSliceVar(&r.agent, "agent", []string{credentials.Agent}, "users of agents, comma separated")
	s.StringSliceVar(&r.crdsync, "crdsync", []string{credentials.Crdsync}, "users of crdsync")
	s.StringSliceVar(&r.operator, "operator", []string{credentials.Operator}, "users of the operator's commands")
	s.StringSliceVar(&r.cloud, "cloud", nil, "users of egret cloud aws, like egret-cloud (default: none, and no role)")
	s.StringVar(&r.root, "root", credentials.Root, "user that may do everything, for --enable")
	s.BoolVar(&r.apply, "apply", false, "add what is missing")
	s.BoolVar(&r.narrow, "narrow", false, "with --apply: take away what is too much, once all daemons are of this version")
	s.BoolVar(&r.enable, "enable", false, "with --apply: have etcd hold its clients to their roles")
	s.DurationVar(&r.keep, "keep", 0, "with --apply: go on, and look again this often; 0: once")
	s.BoolVar(&r.makeRoom, "make-room", false, "with --keep: defragment etcd's members, one at a time, and make room in a full etcd, which is root's alone to do")
	logs.add(s)
	c.RunE = configured(nil, func(c *cobra.Command, _ []string) error {
		if err := r.validate(); err != nil {
			return err
		}
		if r.keep == 0 {
			client, err := r.etcd.dial(c.Context(), quiet)
			if err != nil {
				return err
			}
			defer client.Close()
			return r.once(c.Context(), client, c.OutOrStdout())
		}
		log, _, err := logs.logger(os.Stderr)
		if err != nil {
			return err
		}
		return r.run(c.Context(), log, c.OutOrStdout())
	})
	return c
}

// validate refuses what would lock the caller out.
func (r *rbac) validate() error {
	var errs []error
	if !r.apply && (r.enable || r.narrow || r.keep != 0) {
		errs = append(errs, errors.New("--enable, --narrow and --keep change something: they want --apply"))
	}
	if r.narrow && r.keep != 0 {
		errs = append(errs, errors.New("--narrow with --keep: daemons of another version that start later would lose their rights"))
	}
	if r.makeRoom && r.keep == 0 {
		errs = append(errs, errors.New("--make-room goes on: it wants --keep"))
	}
	if r.keep < 0 {
		errs = append(errs, fmt.Errorf("--keep %v: want a time, or 0", r.keep))
	}
	if r.keep != 0 {
		errs = append(errs, r.etcd.secured())
	}
	if r.enable {
		who, _, _ := strings.Cut(r.etcd.user, ":")
		if pair, err := tls.LoadX509KeyPair(r.etcd.cert, r.etcd.key); who == "" && r.etcd.cert != "" && err == nil {
			who = pair.Leaf.Subject.CommonName
		}
		if who != r.root {
			errs = append(errs, fmt.Errorf("--enable as %q: afterwards only %q may change etcd's users, so it takes that one: show its certificate (--cert), or name it with --root or --user",
				who, r.root))
		}
	}
	return errors.Join(errs...)
}

func (r *rbac) roles(prefix string) []store.Role {
	role := func(part string, users []string, grants []store.Grant) store.Role {
		return store.Role{Name: store.RoleName(prefix, part), Users: users, Grants: grants}
	}
	roles := []store.Role{
		role("agent", r.agent, store.AgentGrants), role("crdsync", r.crdsync, store.CrdsyncGrants), role("operator", r.operator, store.OperatorGrants),
	}
	if len(r.cloud) > 0 {
		roles = append(roles, role("cloud", r.cloud, store.CloudGrants))
	}
	return roles
}

// run looks again and again until ctx ends.
func (r *rbac) run(ctx context.Context, log *slog.Logger, w io.Writer) error {
	client, err := r.etcd.await(ctx, log)
	if err != nil {
		return err
	}
	defer client.Close()
	if r.makeRoom {
		var wg sync.WaitGroup
		defer wg.Wait()
		wg.Go(func() { crdsync.MakeRoom(ctx, client, log) })
	}
	for said := ""; ; {
		wait := r.keep
		if err := r.once(ctx, client, w); err == nil {
			said = ""
		} else if wait = min(wait, rbacRetry); ctx.Err() == nil && err.Error() != said {
			said = err.Error()
			log.Error("cannot keep etcd's users, will retry", "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

func (r *rbac) once(ctx context.Context, client *store.Client, w io.Writer) error {
	changes, more, err := client.DiffRoles(ctx, r.roles(client.Prefix()))
	if errors.Is(err, rpctypes.ErrPermissionDenied) {
		return fmt.Errorf("%w: it takes etcd's user root: show its certificate, --cert and --key", err)
	}
	if err != nil {
		return err
	}
	if r.keep == 0 {
		for _, m := range more {
			fmt.Fprintf(w, "# has other roles, too, and may do what they say: user %s\n", m)
		}
	}
	for _, change := range changes {
		if !change.Narrows || r.narrow {
			fmt.Fprintln(w, "etcdctl "+change.Etcdctl)
		} else if r.keep == 0 {
			fmt.Fprintf(w, "# too much for this version, and taken away with --apply --narrow: etcdctl %s\n", change.Etcdctl)
		}
	}
	if !r.narrow {
		changes = slices.DeleteFunc(changes, func(c store.RoleChange) bool { return c.Narrows })
	}
	on, err := client.AuthEnabled(ctx)
	if err != nil {
		return err
	}
	if !on && !r.enable && r.keep == 0 {
		fmt.Fprintln(w, "# etcd asks nobody who he is until `etcdctl auth enable`, or --apply --enable: any client may write everything")
	}
	if !r.apply {
		return nil
	}
	if err := client.ChangeRoles(ctx, changes); err != nil {
		return err
	}
	if on || !r.enable {
		return nil
	}
	if err := client.EnableAuth(ctx, r.root); err != nil {
		return err
	}
	fmt.Fprintln(w, "etcdctl auth enable")
	return nil
}

// sayRights logs what etcd does not let a daemon do, and whether it lets it do more than its part: foreign are keys of
// another part. The daemon begins meanwhile, with what it may; stop ends the question.
func sayRights(ctx context.Context, client *store.Client, grants []store.Grant, foreign string, log *slog.Logger) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		switch lacks, err := client.Lacks(ctx, grants); {
		case ctx.Err() != nil:
		case err != nil:
			log.Warn("it is not known what etcd allows", "err", err)
		case len(lacks) > 0:
			log.Error("etcd does not allow what this needs", "err", refusedBy(lacks))
		default:
			if refused, err := client.Lacks(ctx, []store.Grant{{Key: foreign, Write: true}}); err == nil && len(refused) == 0 {
				log.Info("etcd lets any client write everything: egret etcd-rbac gives each part its own keys")
			}
		}
	})
	return func() {
		cancel()
		wg.Wait()
	}
}

// refusedBy is the error of a user that lacks rights.
func refusedBy(lacks []string) error {
	return fmt.Errorf("etcd refuses to %s: run `egret etcd-rbac --apply` as etcd's user root, and see whether this certificate is of a user with a role", strings.Join(lacks, ", "))
}
