// SPDX-License-Identifier: Apache-2.0

package chart

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/yaml"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/cluster"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/components"
)

// namespace is that of the manifests in examples/kubernetes.
const namespace = "tailscale-impersonate"

// All tests share these. They are set before the tests run.
var (
	root       string // of the project
	kubeconfig string // of the administrator
)

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(run(m))
}

func run(m *testing.M) (code int) {
	dir, err := os.MkdirTemp("", "lab-chart-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	c, err := start(ctx, dir)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	} else {
		code = m.Run()
	}
	if c != nil {
		if err := c.Stop(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	if code != 0 {
		fmt.Fprintln(os.Stderr, "the cluster's logs are in", dir)
		return code
	}
	if err := os.RemoveAll(dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// start starts an API server that has the namespace of the manifests, in which only
// restricted pods may run, and ServiceMonitors.
func start(ctx context.Context, dir string) (c *cluster.Cluster, err error) {
	if root, err = lab.Root(); err != nil {
		return nil, err
	}
	kubeconfig = filepath.Join(dir, "kubeconfig")
	manifests, err := os.ReadFile(filepath.Join(root, "examples", "kubernetes", "00-namespace.yaml"))
	if err != nil {
		return nil, err
	}
	bin, err := components.Dir()
	if err != nil {
		return nil, err
	}
	monitors, err := os.ReadFile(filepath.Join(bin, "servicemonitors.yaml"))
	if err != nil {
		return nil, fmt.Errorf(`%w: run "make chart-test"`, err)
	}
	if c, err = cluster.Start(ctx, cluster.Config{Dir: filepath.Join(dir, "cluster")}); err != nil {
		return nil, err
	}
	if err := c.AdminKubeconfig(kubeconfig); err != nil {
		return c, err
	}
	if err := c.Apply(ctx, manifests); err != nil {
		return c, err
	}
	if err := c.Apply(ctx, monitors); err != nil {
		return c, err
	}
	cmd, err := lab.Kubectl(ctx, kubeconfig, "wait", "--for=condition=Established", "--timeout=60s", "crd/servicemonitors.monitoring.coreos.com")
	if err != nil {
		return c, err
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		return c, fmt.Errorf("%w: %s", err, out)
	}
	return c, nil
}

// output runs a command with input.
func output(cmd *exec.Cmd, input string) (stdout, stderr string, err error) {
	var out, errOut bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(input), &out, &errOut
	err = cmd.Run()
	return out.String(), errOut.String(), err
}

// kubectl runs kubectl as the administrator. It fails the test if kubectl fails.
func kubectl(t *testing.T, input string, args ...string) (stdout, stderr string) {
	t.Helper()
	cmd, err := lab.Kubectl(t.Context(), kubeconfig, args...)
	if err != nil {
		t.Fatal(err)
	}
	stdout, stderr, err = output(cmd, input)
	if err != nil {
		t.Fatalf("kubectl %s: %v\n%s%s", strings.Join(args, " "), err, stdout, stderr)
	}
	return stdout, stderr
}

// tryHelm runs Helm as the administrator.
func tryHelm(t *testing.T, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	cmd, err := lab.Helm(t.Context(), kubeconfig, args...)
	if err != nil {
		t.Fatal(err)
	}
	return output(cmd, "")
}

// helm runs Helm and fails the test if Helm fails.
func helm(t *testing.T, args ...string) (stdout string) {
	t.Helper()
	stdout, stderr, err := tryHelm(t, args...)
	if err != nil {
		t.Fatalf("helm %s: %v\n%s%s", strings.Join(args, " "), err, stdout, stderr)
	}
	return stdout
}

// chartDir returns the chart's folder.
func chartDir() string { return filepath.Join(root, "charts", "caddy-tailscale-impersonate") }

// valuesFile returns the path of a file with values of this package.
func valuesFile(name string) string {
	return filepath.Join(root, "lab", "chart", "testdata", name+".yaml")
}

// template renders the chart as the release k8s, with values of this package and further
// arguments.
func template(t *testing.T, values string, args ...string) (manifests string) {
	t.Helper()
	return helm(t, append([]string{"template", "k8s", chartDir(), "--namespace", namespace, "--values", valuesFile(values)}, args...)...)
}

// forEachValues runs a test for each file of values of this package.
func forEachValues(t *testing.T, test func(t *testing.T, values string)) {
	t.Helper()
	files, err := filepath.Glob(valuesFile("*"))
	if err != nil || len(files) < 8 {
		t.Fatalf("got the values %v: %v", files, err)
	}
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".yaml")
		t.Run(name, func(t *testing.T) { test(t, name) })
	}
}

// parse returns the objects of manifests.
func parse(t *testing.T, manifests string) (objects []*unstructured.Unstructured) {
	t.Helper()
	decoder := yaml.NewYAMLOrJSONDecoder(strings.NewReader(manifests), 4096)
	for {
		object := &unstructured.Unstructured{}
		err := decoder.Decode(&object.Object)
		if errors.Is(err, io.EOF) {
			return objects
		}
		if err != nil {
			t.Fatalf("%v in\n%s", err, manifests)
		}
		if len(object.Object) > 0 {
			objects = append(objects, object)
		}
	}
}

// find returns the object with a kind and a name.
func find(t *testing.T, objects []*unstructured.Unstructured, kind, name string) *unstructured.Unstructured {
	t.Helper()
	for _, object := range objects {
		if object.GetKind() == kind && object.GetName() == name {
			return object
		}
	}
	t.Fatalf("there is no %s %s", kind, name)
	return nil
}

// caddyfile returns the Caddyfile among rendered objects.
func caddyfile(t *testing.T, objects []*unstructured.Unstructured) string {
	t.Helper()
	text, ok, err := unstructured.NestedString(find(t, objects, "ConfigMap", "k8s-caddyfile").Object, "data", "Caddyfile")
	if !ok || err != nil {
		t.Fatalf("the ConfigMap has no Caddyfile: %v", err)
	}
	return text
}
