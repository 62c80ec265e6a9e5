// Files that a node wrote for the page.
import { api } from "../../../scripts/api.js";

export function fileURL({ filename, subfolder, type }) {
  return api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`);
}
