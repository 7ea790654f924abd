// The JavaScript client @huggingface/hub against a hub: create, upload, list, download, delete. run.py starts it.
import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import {
  createBranch,
  createRepo,
  commit,
  deleteFile,
  deleteRepo,
  downloadFile,
  fileDownloadInfo,
  fileExists,
  listCommits,
  listFiles,
  listModels,
  modelInfo,
  pathsInfo,
  repoExists,
  uploadFile,
  uploadFiles,
  whoAmI,
} from "@huggingface/hub";

const [hubUrl, accessToken, user] = ["HUB_URL", "HUB_TOKEN", "HUB_USER"].map((name) => process.env[name]);
const repo = { type: "model", name: `${user}/from-javascript` };
const common = { hubUrl, accessToken, repo };

function bytes(length) {
  const content = new Uint8Array(length);
  for (let i = 0; i < length; i += 4) {
    const value = Math.imul(i + 1, 2654435761) >>> 0;
    content.set([value & 255, (value >> 8) & 255, (value >> 16) & 255, value >>> 24].slice(0, length - i), i);
  }
  return content;
}

const sha256 = (content) => createHash("sha256").update(content).digest("hex");
const names = async (options) => {
  const found = [];
  for await (const file of listFiles({ ...common, recursive: true, ...options })) found.push(file.path);
  return found.sort();
};

const steps = {
  "says who is logged in": async () => {
    assert.equal((await whoAmI({ hubUrl, accessToken })).name, user);
  },
  "creates a repository": async () => {
    await createRepo(common);
    assert.equal(await repoExists(common), true);
    assert.equal(await repoExists({ ...common, repo: { type: "model", name: `${user}/none` } }), false);
  },
  "uploads small files": async () => {
    const card = new Blob(["---\nlicense: mit\ntags: [javascript]\n---\n# card\n"]);
    await uploadFiles({ ...common, files: [{ path: "README.md", content: card }, { path: "a/ü b.txt", content: new Blob(["ü"]) }] });
  },
  "uploads a large file as it does by default": async () => {
    await uploadFile({ ...common, file: { path: "xet.safetensors", content: new Blob([bytes(3_000_001)]) } });
  },
  "uploads a large file by LFS": async () => {
    await uploadFiles({ ...common, useXet: false, files: [{ path: "lfs.bin", content: new Blob([bytes(2_000_003)]) }] });
  },
  "lists files, in pages and by path": async () => {
    assert.deepEqual(await names(), [".gitattributes", "README.md", "a", "a/ü b.txt", "lfs.bin", "xet.safetensors"]);
    const [info] = await pathsInfo({ ...common, paths: ["lfs.bin"], expand: true });
    assert.equal(info.lfs.oid, sha256(bytes(2_000_003)));
    assert.ok(info.lastCommit.id);
  },
  "downloads what was uploaded": async () => {
    for (const [path, length] of [["xet.safetensors", 3_000_001], ["lfs.bin", 2_000_003]]) {
      const file = await downloadFile({ ...common, path });
      assert.equal(sha256(new Uint8Array(await file.arrayBuffer())), sha256(bytes(length)));
    }
    assert.equal(await (await downloadFile({ ...common, path: "a/ü b.txt" })).text(), "ü");
    assert.equal((await fileDownloadInfo({ ...common, path: "lfs.bin" })).size, 2_000_003);
    assert.equal(await downloadFile({ ...common, path: "none" }), null);
  },
  "describes and finds the model": async () => {
    const info = await modelInfo({ hubUrl, accessToken, name: repo.name, additionalFields: ["tags", "sha"] });
    assert.ok(info.tags.includes("javascript") && info.sha.length === 40);
    const found = [];
    for await (const model of listModels({ hubUrl, accessToken, search: { owner: user, query: "javascript" } })) found.push(model.name);
    assert.deepEqual(found, [repo.name]);
  },
  "makes a branch and a pull request": async () => {
    await createBranch({ ...common, branch: "side" });
    await uploadFile({ ...common, branch: "side", file: { path: "only-here.txt", content: new Blob(["1"]) } });
    assert.equal(await fileExists({ ...common, path: "only-here.txt", revision: "side" }), true);
    assert.equal(await fileExists({ ...common, path: "only-here.txt" }), false);
    const file = { path: "proposed.txt", content: new Blob(["2"]) };
    const made = await uploadFile({ ...common, isPullRequest: true, commitTitle: "Propose", file });
    assert.match(made.pullRequestUrl, /discussions\/1$/);
  },
  "lists commits": async () => {
    const titles = [];
    for await (const one of listCommits({ ...common })) titles.push(one.title);
    assert.equal(titles.at(-1), "initial commit");
    assert.ok(titles.length >= 4);
  },
  "refuses a commit on an old parent": async () => {
    const parentCommit = "0".repeat(40);
    const operations = [{ operation: "addOrUpdate", path: "x", content: new Blob(["x"]) }];
    await assert.rejects(commit({ ...common, title: "late", parentCommit, operations }), /updated since/);
  },
  "deletes a file and the repository": async () => {
    await deleteFile({ ...common, path: "lfs.bin" });
    assert.equal(await fileExists({ ...common, path: "lfs.bin" }), false);
    await deleteRepo(common);
    assert.equal(await repoExists(common), false);
  },
};

let failed = 0;
for (const [name, step] of Object.entries(steps)) {
  try {
    await step();
    console.log(`npm passed  ${name}`);
  } catch (error) {
    failed += 1;
    console.log(`npm FAILED  ${name}: ${error.stack ?? error}`);
  }
}
console.log(`npm client: ${Object.keys(steps).length - failed} passed, ${failed} failed`);
process.exit(failed ? 1 : 0);
