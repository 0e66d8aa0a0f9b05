// SPDX-License-Identifier: Apache-2.0

// Command image builds the container image, for amd64 and arm64, without a container
// engine: as an OCI layout, as a tar of it, and with a bill of materials for each
// architecture. Two builds of the same commit with the same Go are the same bytes.
//
// The image holds the Caddy that the flag -caddy names for each architecture, which
// xcaddy has built with caddy-tailscale. Without that flag it holds a Caddy with the
// lab's stand-in for caddy-tailscale, and says so in its tag and its labels: such an
// image is for the project's own tests, has no version and cannot be pushed.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

// options are the command's flags.
type options struct {
	out, version, push string
	architectures      []string
	caddies            map[string]string // by architecture
	twice              bool
}

func main() {
	o := options{architectures: architectures, caddies: make(map[string]string)}
	flag.StringVar(&o.out, "out", "", "folder for the result, which is removed first (default: .bin/image in the lab's folder)")
	flag.Func("caddy", "an architecture and the path of a static Caddy for it, such as amd64=caddy-amd64; for each architecture, or for none", func(value string) error {
		arch, path, _ := strings.Cut(value, "=")
		if !slices.Contains(architectures, arch) || path == "" {
			return fmt.Errorf("want <architecture>=<path>, with an architecture of %v", architectures)
		}
		o.caddies[arch] = path
		return nil
	})
	flag.Func("arch", "build only for this architecture, which is enough for a test: only without -caddy", func(value string) error {
		if !slices.Contains(architectures, value) {
			return fmt.Errorf("want one of %v", architectures)
		}
		o.architectures = []string{value}
		return nil
	})
	flag.StringVar(&o.version, "version", "", "the release that the image is, such as v1.2.3; only with -caddy")
	flag.StringVar(&o.push, "push", "", "build nothing, and push the release that was built to this repository, with the credentials of Docker's configuration")
	flag.BoolVar(&o.twice, "twice", false, "build everything a second time, and fail unless the digests are equal")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, o)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) error {
	root, err := lab.Root()
	if err != nil {
		return err
	}
	if flag.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", flag.Arg(0))
	}
	if n := len(o.caddies); n > 0 && n < len(architectures) {
		return fmt.Errorf("-caddy is given for %v; want it for each of %v, or for none", slices.Sorted(maps.Keys(o.caddies)), architectures)
	}
	if len(o.caddies) > 0 && len(o.architectures) < len(architectures) {
		return errors.New("-arch and -caddy are both given: an image of one architecture is only for tests, and has the stand-in")
	}
	if o.out == "" {
		o.out = filepath.Join(root, "lab", ".bin", "image")
	}
	if o.push != "" {
		digest, err := push(ctx, filepath.Join(o.out, layoutDir), o.push, remote.WithAuthFromKeychain(authn.DefaultKeychain))
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(o.out, "pushed"), []byte(digest.String()+"\n"), 0o644)
	}
	src, err := sourceOf(ctx, root)
	if err != nil {
		return err
	}
	digest, err := build(ctx, root, o, src)
	if err != nil {
		return err
	}
	if !o.twice {
		return nil
	}
	return buildAgain(ctx, root, o, src, digest)
}

// build writes the image and what belongs to it into the folder o.out, and returns the
// image's digest.
func build(ctx context.Context, root string, o options, src source) (v1.Hash, error) {
	if err := os.RemoveAll(o.out); err != nil {
		return v1.Hash{}, err
	}
	if err := os.MkdirAll(o.out, 0o755); err != nil {
		return v1.Hash{}, err
	}
	var caddies []caddy
	for _, arch := range o.architectures {
		path := o.caddies[arch]
		if path == "" {
			path = filepath.Join(o.out, "caddy-linux-"+arch)
			fmt.Printf("==> building Caddy for %s\n", arch)
			if err := buildStandIn(ctx, root, arch, path); err != nil {
				return v1.Hash{}, err
			}
		}
		c, err := inspect(path, arch)
		if err != nil {
			return v1.Hash{}, err
		}
		caddies = append(caddies, c)
	}
	what, err := describe(caddies, o.version, src)
	if err != nil {
		return v1.Hash{}, err
	}
	index, err := assemble(caddies, what)
	if err != nil {
		return v1.Hash{}, err
	}
	if err := write(o.out, index, what); err != nil {
		return v1.Hash{}, err
	}
	for _, c := range caddies {
		if err := writeBOM(filepath.Join(o.out, what.file("linux-"+c.arch+".cdx.json")), c, what); err != nil {
			return v1.Hash{}, err
		}
	}
	digest, err := index.Digest()
	if err != nil {
		return v1.Hash{}, err
	}
	fmt.Printf("==> %s is %s, in %s\n", what.reference(), digest, o.out)
	return digest, os.WriteFile(filepath.Join(o.out, "digest"), []byte(digest.String()+"\n"), 0o644)
}

// buildAgain builds everything in another folder, and fails unless each file is the same.
func buildAgain(ctx context.Context, root string, o options, src source, first v1.Hash) error {
	dir, err := os.MkdirTemp(filepath.Dir(o.out), "image-again-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	again := o
	again.out = filepath.Join(dir, "image")
	second, err := build(ctx, root, again, src)
	if err != nil {
		return err
	}
	if first != second {
		return fmt.Errorf("not reproducible: the first build is %s, the second %s", first, second)
	}
	if err := sameFiles(o.out, again.out); err != nil {
		return fmt.Errorf("not reproducible: %w", err)
	}
	fmt.Println("==> two builds are the same bytes")
	return nil
}

// push sends the image in an OCI layout to a registry, with its version as the tag, and
// returns its digest. It refuses what is not a release.
func push(ctx context.Context, layout, repository string, options ...remote.Option) (v1.Hash, error) {
	index, version, err := read(layout)
	if err != nil {
		return v1.Hash{}, err
	}
	if version == standIn || version == unreleased {
		return v1.Hash{}, fmt.Errorf("%s has no release: its version is %s", layout, version)
	}
	ref, err := name.NewTag(repository + ":" + version)
	if err != nil {
		return v1.Hash{}, err
	}
	if err := remote.WriteIndex(ref, index, append(options, remote.WithContext(ctx))...); err != nil {
		return v1.Hash{}, fmt.Errorf("pushing %s: %w", ref, err)
	}
	digest, err := index.Digest()
	if err != nil {
		return v1.Hash{}, err
	}
	fmt.Printf("==> pushed %s@%s\n", ref, digest)
	return digest, nil
}

// source says which source code the image is built from.
type source struct {
	revision string    // "" if unknown
	time     time.Time // never of the build itself, which would make each build another one
}

// sourceOf asks git. SOURCE_DATE_EPOCH overrides the time, as it does for other tools.
func sourceOf(ctx context.Context, root string) (source, error) {
	src := source{time: time.Unix(0, 0).UTC()}
	git := func(args ...string) (string, error) {
		cmd := exec.CommandContext(ctx, "git", args...)
		cmd.Dir = root
		out, err := cmd.Output()
		return strings.TrimSpace(string(out)), err
	}
	epoch := os.Getenv("SOURCE_DATE_EPOCH")
	// A source archive has no history.
	if commit, err := git("log", "-1", "--format=%H %ct"); err == nil {
		revision, committed, _ := strings.Cut(commit, " ")
		src.revision = revision
		if changed, err := git("status", "--porcelain"); err != nil || changed != "" {
			src.revision += "-modified"
		}
		if epoch == "" {
			epoch = committed
		}
	}
	if epoch != "" {
		seconds, err := strconv.ParseInt(epoch, 10, 64)
		if err != nil {
			return source{}, fmt.Errorf("SOURCE_DATE_EPOCH: %w", err)
		}
		src.time = time.Unix(seconds, 0).UTC()
	}
	return src, nil
}
