// SPDX-License-Identifier: Apache-2.0

package kubetest

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Users and groups of the images. The tests expect user 1000 to be in group 50000.
const (
	passwd = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\nuser-defined-in-image:x:1000:1000::/:/bin/sh\n"
	groups = "root:x:0:\nnogroup:x:65534:\nuser-defined-in-image:x:1000:\ngroup-defined-in-image:x:50000:user-defined-in-image\n"
)

// baseLayer returns the layer that all images have: Debian's packages, and a link to busybox for
// each further program that it has.
func baseLayer(ctx context.Context, dir string) (v1.Layer, error) {
	packages, err := download(ctx, filepath.Join(dir, "debian"), baseNeeds)
	if err != nil {
		return nil, err
	}
	var l layer
	have := make(map[string]bool)
	for _, p := range packages {
		if err := l.addPackage(ctx, p, have); err != nil {
			return nil, fmt.Errorf("%s: %w", p, err)
		}
	}
	link := func(name, to string) {
		if !have[name] {
			have[name] = true
			l.add(&tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: to, Mode: 0o777}, nil)
		}
	}
	link("bin/sh", "bash")
	link("bin/nc", "nc.openbsd")
	applets, err := busyboxApplets(ctx, dir, packages)
	if err != nil {
		return nil, err
	}
	for _, applet := range applets {
		if !have["usr/bin/"+applet] && !have["usr/sbin/"+applet] && !have["sbin/"+applet] {
			link("bin/"+applet, "busybox")
		}
	}
	l.addFile("etc/passwd", []byte(passwd), 0o644)
	l.addFile("etc/group", []byte(groups), 0o644)
	l.addFile("etc/nsswitch.conf", []byte("passwd: files\ngroup: files\nhosts: files dns\n"), 0o644)
	for _, folder := range []tar.Header{{Name: "tmp/", Mode: 0o1777}, {Name: "var/tmp/", Mode: 0o1777}, {Name: "root/", Mode: 0o700}, {Name: "uploads/", Mode: 0o755}} {
		folder.Typeflag = tar.TypeDir
		l.add(&folder, nil)
	}
	return l.close()
}

// unneeded are folders of packages that no test reads.
var unneeded = []string{"usr/share/doc/", "usr/share/man/", "usr/share/locale/", "usr/share/lintian/", "usr/share/info/", "usr/share/bug/"}

// addPackage adds the files of a Debian package, and their names to have.
func (l *layer) addPackage(ctx context.Context, deb string, have map[string]bool) error {
	files, err := contents(ctx, deb)
	if err != nil {
		return err
	}
	for reader := tar.NewReader(bytes.NewReader(files)); ; {
		header, err := reader.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(header.Name, "./")
		if name == "" || slices.ContainsFunc(unneeded, func(folder string) bool { return strings.HasPrefix(name, folder) }) {
			continue
		}
		if have[name] && header.Typeflag == tar.TypeDir {
			continue
		}
		have[name] = true
		header.Name = name
		l.add(header, reader)
	}
}

// contents returns the files of a Debian package as a tar file.
func contents(ctx context.Context, deb string) ([]byte, error) {
	out, err := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", deb).Output()
	if err != nil {
		return nil, fmt.Errorf("dpkg-deb: %w: %s", err, stderrOf(err))
	}
	return out, nil
}

// busyboxApplets returns the names of the programs that busybox has.
func busyboxApplets(ctx context.Context, dir string, packages []string) ([]string, error) {
	i := slices.IndexFunc(packages, func(p string) bool { return strings.HasPrefix(filepath.Base(p), "busybox-static_") })
	if i < 0 {
		return nil, errors.New("busybox-static is not among the packages")
	}
	unpacked := filepath.Join(dir, "busybox")
	if out, err := exec.CommandContext(ctx, "dpkg-deb", "--extract", packages[i], unpacked).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("dpkg-deb: %w: %s", err, out)
	}
	out, err := exec.CommandContext(ctx, filepath.Join(unpacked, "bin", "busybox"), "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("busybox --list: %w", err)
	}
	return strings.Fields(string(out)), nil
}

// download downloads Debian packages, and all that they depend on, into dir. It returns their
// files. What is there from an earlier run is not downloaded again.
func download(ctx context.Context, dir string, packages []string) ([]string, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	done := filepath.Join(dir, strings.Join(packages, "+")+".done")
	if _, err := os.Stat(done); err != nil {
		closure, err := dependencies(ctx, packages)
		if err != nil {
			return nil, err
		}
		if err := aptDownload(ctx, dir, closure); err != nil {
			return nil, err
		}
		if err := os.WriteFile(done, nil, 0o600); err != nil {
			return nil, err
		}
	}
	files, err := filepath.Glob(filepath.Join(dir, "*.deb"))
	slices.Sort(files)
	return files, err
}

// aptDownload downloads exactly these packages into dir. A list of packages that is out of date is
// one reason why they cannot be downloaded.
func aptDownload(ctx context.Context, dir string, packages []string) error {
	apt := func(args ...string) error {
		cmd := exec.CommandContext(ctx, "apt-get", append([]string{"--quiet=2", "--option=APT::Sandbox::User=root"}, args...)...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("apt-get %s: %w: %s", args[0], err, out)
		}
		return nil
	}
	first := apt(append([]string{"download"}, packages...)...)
	if first == nil {
		return nil
	}
	if err := apt("update"); err != nil {
		return errors.Join(first, err)
	}
	return apt(append([]string{"download"}, packages...)...)
}

// dependencies returns Debian packages and all packages that they depend on.
func dependencies(ctx context.Context, packages []string) ([]string, error) {
	args := []string{"depends", "--recurse", "--no-recommends", "--no-suggests", "--no-conflicts", "--no-breaks", "--no-replaces", "--no-enhances"}
	out, err := exec.CommandContext(ctx, "apt-cache", append(args, packages...)...).Output()
	if err != nil {
		return nil, fmt.Errorf("apt-cache: %w: %s", err, stderrOf(err))
	}
	var closure []string
	for line := range strings.Lines(string(out)) {
		name := strings.TrimSpace(line)
		// Indented lines are dependencies, which have lines of their own. Virtual packages
		// have angle brackets.
		if strings.HasPrefix(line, " ") || strings.HasPrefix(name, "<") || name == "" {
			continue
		}
		closure = append(closure, name)
	}
	slices.Sort(closure)
	return slices.Compact(closure), nil
}

// stderrOf returns what a command that failed has written to standard error.
func stderrOf(err error) string {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return strings.TrimSpace(string(exit.Stderr))
	}
	return ""
}
