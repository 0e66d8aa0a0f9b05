// SPDX-License-Identifier: Apache-2.0

package machine

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// group is this process' control group in one hierarchy of version 1.
type group struct {
	name    string // of the folder that the hierarchy is mounted on, such as "cpu,cpuacct"
	options string // with which it is mounted
	dir     string // the group's folder
}

// ownGroups returns this process' control groups by controller.
func ownGroups() (map[string]group, error) {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, err
	}
	groups := make(map[string]group)
	for line := range strings.Lines(string(own)) {
		// Such as 4:cpu,cpuacct:/path.
		fields := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(fields) != 3 || fields[1] == "" {
			continue // version 2
		}
		point, root := mountedHierarchy(mounts, fields[1])
		if point == "" {
			continue
		}
		rel, err := filepath.Rel(root, fields[2])
		if err != nil || strings.HasPrefix(rel, "..") {
			return nil, fmt.Errorf("the control group %s is not below %s, which is mounted on %s", fields[2], root, point)
		}
		g := group{name: filepath.Base(point), options: fields[1], dir: filepath.Join(point, rel)}
		for controller := range strings.SplitSeq(fields[1], ",") {
			groups[controller] = g
		}
	}
	return groups, nil
}

// mountedHierarchy returns where the hierarchy with these controllers is mounted, and
// which of its groups.
func mountedHierarchy(mounts []byte, controllers string) (point, root string) {
	for line := range strings.Lines(string(mounts)) {
		// Such as 32 31 0:29 /root /point rw - cgroup cgroup rw,cpu.
		front, back, _ := strings.Cut(strings.TrimSpace(line), " - ")
		f, b := strings.Fields(front), strings.Fields(back)
		if len(f) < 5 || len(b) < 3 || b[0] != "cgroup" {
			continue
		}
		if strings.Contains(","+b[2]+",", ","+controllers+",") {
			return f[4], f[3]
		}
	}
	return "", ""
}

// hierarchies returns one group for each hierarchy.
func hierarchies() (map[string]group, error) {
	groups, err := ownGroups()
	if err != nil {
		return nil, err
	}
	once := make(map[string]group)
	for _, g := range groups {
		once[g.name] = g
	}
	return once, nil
}

// createGroups creates a group of the given name below each of this process' groups.
func createGroups(name string) error {
	groups, err := hierarchies()
	if err != nil {
		return err
	}
	for _, g := range groups {
		dir := filepath.Join(g.dir, name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		// A new cpuset is empty and takes no process.
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
			value, err := os.ReadFile(filepath.Join(g.dir, file))
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(dir, file), bytes.TrimSpace(value), 0o600); err != nil {
				return err
			}
		}
	}
	return nil
}

// enterGroups moves a process into the groups of that name.
func enterGroups(name string, pid int) error {
	groups, err := hierarchies()
	if err != nil {
		return err
	}
	for _, g := range groups {
		if err := os.WriteFile(filepath.Join(g.dir, name, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// removeGroups removes the groups of that name and all groups below. Their processes
// have been killed.
func removeGroups(name string) error {
	groups, err := hierarchies()
	if err != nil {
		return err
	}
	var errs []error
	for _, g := range groups {
		errs = append(errs, removeGroup(filepath.Join(g.dir, name)))
	}
	return errors.Join(errs...)
}

// removeGroup removes a group and all groups below it.
func removeGroup(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeGroup(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	// A killed process may stay in its group for a moment.
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		err := unix.Rmdir(dir)
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return &fs.PathError{Op: "rmdir", Path: dir, Err: err}
		}
	}
}
