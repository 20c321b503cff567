package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

// cgroupRoot is where the machine has its cgroups (cgroups(7)): with version 1 a hierarchy in each folder.
const cgroupRoot = "/sys/fs/cgroup"

// cgroup returns the path, in every hierarchy, of all of a node's cgroups.
func (l *Lab) cgroup(node string) string { return filepath.Join("egret-lab-"+l.cfg.Name, node) }

// hierarchies returns the folders of the version 1 hierarchies.
func hierarchies() ([]string, error) {
	if _, err := os.Stat(filepath.Join(cgroupRoot, "cgroup.controllers")); err == nil {
		return nil, errors.New("the machine has cgroups of version 2, and a lab with kubelets makes those of version 1: boot it with systemd.unified_cgroup_hierarchy=0")
	}
	dirs, err := filepath.Glob(filepath.Join(cgroupRoot, "*", "cgroup.procs"))
	if err != nil {
		return nil, err
	}
	var all []string
	for _, procs := range dirs {
		dir := filepath.Dir(procs)
		// version 2 has it, and kubelet leaves that alone
		if _, err := os.Stat(filepath.Join(dir, "cgroup.controllers")); err != nil {
			all = append(all, dir)
		}
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("%s has no cgroups: mount them", cgroupRoot)
	}
	return all, nil
}

// nodeShares is the weight of a node's pods on the machine's processors, as of 4 CPUs. Where they have a machine of their
// own, a kubelet's and all other daemons weigh 1024 together; here each weighs that, and the pods of all nodes were one
// more.
const nodeShares = 4096

// makeCgroups makes a node's cgroup in every hierarchy: a kubelet wants to find it.
func (l *Lab) makeCgroups(node string) error {
	all, err := hierarchies()
	if err != nil {
		return err
	}
	for _, dir := range all {
		parent := dir
		for _, name := range []string{filepath.Dir(l.cgroup(node)), node} {
			child := filepath.Join(parent, name)
			if err := os.MkdirAll(child, 0o755); err != nil {
				return err
			}
			// a new cpuset takes no process before it has these
			for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
				b, err := os.ReadFile(filepath.Join(parent, file))
				if errors.Is(err, fs.ErrNotExist) {
					continue
				}
				if err := errors.Join(err, os.WriteFile(filepath.Join(child, file), b, 0)); err != nil {
					return err
				}
			}
			parent = child
		}
		if err := giveShares(filepath.Join(dir, filepath.Dir(l.cgroup(node)))); err != nil {
			return err
		}
	}
	return nil
}

// giveShares gives the cgroup of a lab, and each node's in it, their weight, in the hierarchy that has such.
func giveShares(lab string) error {
	nodes, err := filepath.Glob(filepath.Join(lab, "*", "cpu.shares"))
	if err != nil {
		return err
	}
	for _, file := range nodes {
		err = errors.Join(err, os.WriteFile(file, []byte(strconv.Itoa(nodeShares)), 0))
	}
	if len(nodes) > 0 {
		err = errors.Join(err, os.WriteFile(filepath.Join(lab, "cpu.shares"), []byte(strconv.Itoa(len(nodes)*nodeShares)), 0))
	}
	return err
}

// removeCgroups removes those of all nodes, which their processes do not take along, and waits for processes that the
// kernel is still ending.
func (l *Lab) removeCgroups(ctx context.Context) error {
	// the pattern is one: names are checked
	all, _ := filepath.Glob(filepath.Join(cgroupRoot, "*", "egret-lab-"+l.cfg.Name))
	for _, top := range all {
		for {
			err := removeTree(top)
			if err == nil {
				break
			}
			if !errors.Is(err, unix.EBUSY) || sleep(ctx, pollInterval) != nil {
				return fmt.Errorf("removing cgroup %s: %w", top, err)
			}
		}
	}
	return nil
}

// removeTree removes a cgroup and those below it; the files in them go with them. One that is gone is no error: a
// version 1 hierarchy of two controllers has a second name for each, and what was removed by one is gone by the other.
func removeTree(top string) error {
	var dirs []string
	err := filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return err
	})
	for _, dir := range slices.Backward(dirs) {
		if rerr := unix.Rmdir(dir); rerr != nil && !errors.Is(rerr, unix.ENOENT) {
			err = errors.Join(err, rerr)
		}
	}
	return err
}
